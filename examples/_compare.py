"""What ``compare_methods.py`` trains: tasks, the model, training as a pure function.

The model is a multilayer perceptron, on pixels or on the embeddings of the bytes before
the one to guess. Its three kernels are what the methods make sparse; biases and
embeddings stay dense. Shapes: B examples, F features, C classes.
"""

import dataclasses
import hashlib
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import _data
import jax
import jax.numpy as jnp
import numpy as np
import optax

from sparsejax import masks, transforms

EMBEDDING = 32  # features per byte of text


@dataclasses.dataclass(frozen=True)
class Settings:
    """What all trainings of a comparison share. Rows of other settings do not mix."""

    data: str = "digits"
    examples: int = 597  # to train on; of text: all there are
    width: int = 128  # of the two hidden layers
    steps: int = 1000
    batch: int = 64
    learning_rate: float = 2e-3  # at first; falls to 0 by a cosine
    weight_decay: float = 1e-2
    every: int = 25  # steps between mask updates
    soup_rate: float = 1e-2  # learning rate at first of a soup's members
    context: int = 16  # bytes of text before the one to guess
    digest: str = ""  # of the data

    @property
    def end(self) -> int:
        """The last step after which masks may change: three quarters through."""
        return 3 * self.steps // 4


PRESETS = {
    "digits": Settings(),
    "text": Settings(
        data="text",
        examples=0,
        width=256,
        steps=1000,
        batch=256,
        every=50,
        soup_rate=2e-3,
    ),
}


class Task(NamedTuple):
    """Data and model; the functions are pure."""

    train: Any  # arrays; an argument of the compiled program, not a constant in it
    held_out: dict[str, tuple]  # (inputs, targets) of "validation" and "test"
    init: Callable[[Any], Any]  # key -> params
    draw: Callable[[Any, Any], tuple]  # (train, key) -> inputs [B, ...], targets [B]
    apply: Callable[[Any, Any], Any]  # (params, inputs) -> logits [B, C]
    digest: str


# ---- tasks -------------------------------------------------------------------------


def load_task(settings: Settings, paths: list[str]) -> Task:
    """Reads the data of a comparison and splits it in three.

    Raises:
      ValueError: A path cannot be read, or there is too little data.
    """
    load = {"digits": load_digits, "text": load_text}[settings.data]
    return load(settings, paths)


def load_digits(settings: Settings, paths: list[str]) -> Task:
    """scikit-learn's 1797 images: 800 to test, 400 to validate, `examples` of the rest.

    The split is the same for all seeds and settings.
    """
    import sklearn.datasets

    if paths:
        raise ValueError(f"--paths: got {paths}, needed --data text with it")
    pixels, labels = sklearn.datasets.load_digits(return_X_y=True)
    pixels, labels = np.float32(pixels / 16), np.int32(labels)
    order = np.random.default_rng(0).permutation(len(pixels))
    test, validation, rest = np.split(order, [800, 1200])
    if not 1 <= settings.examples <= len(rest):
        raise ValueError(
            f"--examples: got {settings.examples}, needed 1 to {len(rest)}: the others "
            "are to validate and test"
        )
    train = rest[: settings.examples]

    def draw(train, key):
        at = jax.random.randint(key, (settings.batch,), 0, settings.examples)
        return train[0][at], train[1][at]

    return Task(
        train=(pixels[train], labels[train]),
        held_out={
            "validation": (pixels[validation], labels[validation]),
            "test": (pixels[test], labels[test]),
        },
        init=lambda key: init_mlp(key, (64, settings.width, settings.width, 10)),
        draw=draw,
        apply=apply_mlp,
        digest=hashlib.sha256(pixels.tobytes()).hexdigest()[:16],
    )


def load_text(settings: Settings, paths: list[str]) -> Task:
    """Bytes from those before; the halves of the held-out text validate and test."""
    context = settings.context
    text = _data.load_text(paths, needed=2 * (context + 1), flag="--paths")
    train, held_out = text.train, text.validation
    middle = len(held_out) // 2

    def windows(half):
        wanted = min(8192, len(half) - context)
        starts = np.arange(wanted) * (len(half) - context) // wanted
        found = half[starts[:, None] + np.arange(context + 1)]
        return found[:, :-1], found[:, -1].astype(np.int32)

    def draw(train, key):
        starts = jax.random.randint(
            key, (settings.batch, 1), 0, train.shape[0] - context
        )
        found = train[starts + jnp.arange(context + 1)]
        return found[:, :-1], found[:, -1].astype(jnp.int32)

    def init(key):
        keys = jax.random.split(key)
        sizes = (context * EMBEDDING, settings.width, settings.width, _data.VOCABULARY)
        shape = (_data.VOCABULARY, EMBEDDING)
        return {
            "embedding": jax.random.normal(keys[0], shape),
            **init_mlp(keys[1], sizes),
        }

    def apply(params, inputs):
        vectors = params["embedding"][inputs.astype(jnp.int32)]  # [B, context, F]
        return apply_mlp(params, vectors.reshape(len(inputs), -1))

    return Task(
        train=train,
        held_out={
            "validation": windows(held_out[:middle]),
            "test": windows(held_out[middle:]),
        },
        init=init,
        draw=draw,
        apply=apply,
        digest=text.digest,
    )


def init_mlp(key: Any, sizes: tuple[int, ...]) -> dict[str, Any]:
    """Kernels [F in, F out] of variance 2 / F in, biases zero."""
    keys = jax.random.split(key, len(sizes) - 1)
    return {
        f"layer_{i}": {
            "kernel": jax.random.normal(keys[i], (f_in, f_out)) * (2 / f_in) ** 0.5,
            "bias": jnp.zeros(f_out),
        }
        for i, (f_in, f_out) in enumerate(zip(sizes[:-1], sizes[1:], strict=True))
    }


def apply_mlp(params: Any, x: Any) -> Any:
    """[B, F] -> logits [B, C]."""
    layers = [params[name] for name in sorted(params) if name != "embedding"]
    for i, layer in enumerate(layers):
        x = (jax.nn.relu(x) if i else x) @ layer["kernel"] + layer["bias"]
    return x


# ---- training ----------------------------------------------------------------------


class Case(NamedTuple):
    """One training: what a method is given."""

    task: Task
    train: Any  # the task's training data, as the compiled program sees it
    settings: Settings
    sparsity: float
    pattern: tuple[int, int] | None  # (N, M), for N:M methods
    key: Any  # of the seed

    @property
    def init_key(self):
        """Equal for all methods of a seed, as is the order of the data."""
        return jax.random.fold_in(self.key, 0)

    @property
    def mask_key(self):
        """For what a method draws."""
        return jax.random.fold_in(self.key, 1)

    def batch_key(self, member: int = 0):
        """For the order of the data."""
        return jax.random.fold_in(self.key, 2 + member)

    def loss(self, params, batch):
        """Mean cross entropy, in nats."""
        inputs, targets = batch
        logits = self.task.apply(params, inputs)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        return loss.mean()

    def batch(self, key):
        """Inputs and targets drawn from the training data."""
        return self.task.draw(self.train, key)


def make_optimizer(settings: Settings, rate: Any) -> optax.GradientTransformation:
    """AdamW; no decay on biases and embeddings."""
    return optax.adamw(
        rate,
        weight_decay=settings.weight_decay,
        mask=lambda params: jax.tree_util.tree_map_with_path(
            lambda path, _: is_kernel(path), params
        ),
    )


def fit(
    case: Case,
    updater: transforms.Updater | None = None,
    *,
    params: Any = None,
    steps: int | None = None,
    learning_rate: float | None = None,
    member: int = 0,
    view: Callable[[Any, Any], Any] = lambda params, annealed: params,
    annealing: Callable[[Any], Any] = lambda step: 0.0,
    beside: Callable[[Any], Any] | None = None,
) -> Any:
    """Trains and returns the parameters as the last forward pass would see them.

    Args:
      case: The training.
      updater: Makes the kernels sparse; None: nothing does.
      params: Where to start; None: at random.
      steps: How many; None: as the settings say.
      learning_rate: At first; None: as the settings say.
      member: Another order of the data for each.
      view: `(params, annealed) -> params` that the model is given.
      annealing: Step -> what `view` is given.
      beside: `params -> tree`, subtracted times the learning rate, for decay that the
        optimizer must not divide.
    """
    steps = steps or case.settings.steps
    params = case.task.init(case.init_key) if params is None else params
    first = learning_rate or case.settings.learning_rate
    rate = optax.cosine_decay_schedule(first, steps)
    optimizer = make_optimizer(case.settings, rate)
    if updater is not None:
        optimizer = transforms.sparsify(optimizer, updater)
    optimizer = optax.chain(transforms.anneal(annealing), optimizer)
    opt_state = optimizer.init(params)
    if updater is not None:
        params = masks.apply_masks(params, transforms.get_masks(opt_state))

    def loss(params, annealed, batch):
        return case.loss(view(params, annealed), batch)

    def step(carry, t):
        params, opt_state = carry
        batch = case.batch(jax.random.fold_in(case.batch_key(member), t))
        annealed = transforms.get_annealed(opt_state)
        gradient = jax.grad(loss)(params, annealed, batch)
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        if beside is not None:
            updates = jax.tree.map(
                lambda u, d: u - rate(t) * d, updates, beside(params)
            )
        return (optax.apply_updates(params, updates), opt_state), None

    (params, opt_state), _ = jax.lax.scan(step, (params, opt_state), jnp.arange(steps))
    return view(params, transforms.get_annealed(opt_state))


def on_kernels(f: Callable[[Any], Any], params: Any, others: Any = None) -> Any:
    """`f` of each kernel; other leaves as they are, or by `others`."""
    other = others or (lambda x: x)
    return jax.tree_util.tree_map_with_path(
        lambda path, x: (f if is_kernel(path) else other)(x), params
    )


def is_kernel(path: Any) -> bool:
    """Whether a path is that of a weight to make sparse."""
    return masks.path_name(path).endswith("kernel")


def evaluate(task: Task, params: Any) -> dict[str, Any]:
    """Scores on the held-out splits and the share of the kernels that is not zero.

    Accuracy in percent, or bits per byte.
    """
    kernels = [x for k, x in masks.named_leaves(params).items() if k.endswith("kernel")]
    found = {
        "density": sum(jnp.count_nonzero(kernel) for kernel in kernels)
        / sum(kernel.size for kernel in kernels)
    }
    for split, (inputs, targets) in task.held_out.items():
        logits = task.apply(params, jnp.asarray(inputs))
        if logits.shape[-1] == _data.VOCABULARY:
            loss = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
            found[split] = loss.mean() / math.log(2)
        else:
            found[split] = 100 * (logits.argmax(-1) == targets).mean()
    return found
