"""From a dense network to a mixture of experts, and back: pure functions of trees."""

__all__: list[str] = []
