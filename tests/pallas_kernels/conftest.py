"""Where the Hopper kernels run: in jax's interpreter, or compiled on a Hopper GPU."""

import jax
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu


def _has_hopper():
    device = jax.devices()[0]
    capability = getattr(device, "compute_capability", "")
    return device.platform == "gpu" and str(capability).startswith("9.")


_PLACES = []
if hasattr(plgpu, "InterpretGPUParams"):
    _PLACES.append("simulated")
if _has_hopper():
    _PLACES.append(pytest.param("compiled", marks=pytest.mark.gpu))
if not _PLACES:
    reason = (
        f"jax {jax.__version__} cannot simulate Mosaic GPU kernels (0.11 and later "
        "can) and no Hopper GPU is present"
    )
    _PLACES.append(pytest.param("nowhere", marks=pytest.mark.skip(reason=reason)))


@pytest.fixture(params=_PLACES)
def interpret(request):
    """What the kernels take for ``interpret``; fails if a race was seen."""
    if request.param == "compiled":
        yield None
        return
    # The interpreter's first use imports more of pallas, which adds to jax's
    # configuration, so that what was traced before would be traced anew.
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
    from jax.experimental.pallas import fuser, tpu

    del fuser, tpu
    yield plgpu.InterpretGPUParams(detect_races=True)
    # Later versions raise at the race itself.
    if hasattr(gpu_callbacks, "get_races"):
        assert not gpu_callbacks.get_races().races_found
