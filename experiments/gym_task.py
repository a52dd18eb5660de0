"""Any Gymnasium environment with rgb_array rendering as a task of moto.py, which imports this file
for --task gym:ENV_ID. What does not keep Gymnasium's interface is named in one sentence, with the
step and the value.
"""
import contextlib, importlib.metadata

import numpy as np

import meta_world
import moto


def to_rgb(picture):
    """What an environment's render() gave -> (height, width, 3) uint8: an array (or a list of one)
    that is gray, RGB or opaque RGBA, channels last or first, in uint8, booleans or floats from 0 to
    1. Raises ValueError, which says what it found, on anything else."""
    if isinstance(picture, (list, tuple)) and len(picture) == 1:
        picture, = picture
    if picture is None or isinstance(picture, (list, tuple, dict, str)):
        raise ValueError(f"{type(picture).__name__}, where one array is needed")
    image = np.asarray(picture)
    if image.dtype.kind in "bf":
        if not ((image >= 0) & (image <= 1)).all():       # nan neither
            raise ValueError(f"floats from {image.min():g} to {image.max():g}, which are to be "
                             "from 0 to 1")
        image = (255 * image.astype(np.float64)).round().astype(np.uint8)
    if image.dtype != np.uint8:
        raise ValueError(f"values of {image.dtype}, which are to be uint8, or floats from 0 to 1")
    image = image[..., None] if image.ndim == 2 else image
    last, first = (image.ndim == 3 and image.shape[axis] in (1, 3, 4) for axis in (-1, 0))
    if last == first or not image.size:                   # neither, or either
        raise ValueError(f"shape {image.shape}, where (height, width, 3) is needed")
    image = image if last else np.moveaxis(image, 0, -1)
    if image.shape[-1] == 4 and (image[..., 3] < 255).any():
        raise ValueError("a picture that is in part transparent")
    return np.ascontiguousarray(np.broadcast_to(image[..., :3], (*image.shape[:2], 3)))


class GymTask:
    """Any Gymnasium environment with rgb_array rendering and a bounded Box of actions.

    Actions in [-1, 1] are mapped evenly onto the box, of whole numbers, too; pictures are converted
    by `to_rgb`. A step is a success where info["success"] or info["is_success"] says so; without
    either, where its reward is at least 1. One reset, render and step are tried at once. Raises
    UserError, or, on what the environment itself does wrong, there or in the middle of a run,
    EpisodeError with the step and the value.
    """
    terminates = True

    def __init__(self, cfg):
        trouble = meta_world.choose_gl()                  # for those that are built on MuJoCo
        import gymnasium
        self.name, self.shape, self.steps = cfg.task.removeprefix("gym:"), None, 0
        self.repeat, self.size = cfg.action_repeat, cfg.image_size
        try:
            self.env = gymnasium.make(self.name, render_mode="rgb_array", disable_env_checker=True)
        except Exception as error:
            mend = f"install what it needs{'; ' * bool(trouble)}{trouble}"
            if self.name.split(":")[-1] not in gymnasium.registry:
                hint = moto.nearest(self.name, sorted(gymnasium.registry))
                mend = (f"{hint} What another package registers is gym:MODULE:ID, with the module "
                        "to import")
            raise moto.UserError(f"Gymnasium cannot make {self.name!r} with rgb_array rendering "
                                 f"({error}); {mend}") from None
        self.space = space = self.env.action_space
        box = isinstance(space, gymnasium.spaces.Box) and len(space.shape) == 1
        if not (box and space.is_bounded()):
            raise moto.UserError(f"{self.name} has actions {space}; a one-dimensional bounded Box "
                                 "is needed")
        self.low, self.high = space.low.astype(float), space.high.astype(float)
        if space.dtype.kind != "f" and max(abs(self.low).max(), abs(self.high).max()) > 2 ** 53:
            raise moto.UserError(f"{self.name} has actions {space}; whole numbers are exact up to "
                                 "2^53 only")
        self.action_size, self.close = space.shape[0], self.env.close
        self.reset([0])
        self.step(np.zeros(self.action_size))

    def describe(self):
        return {"gymnasium": importlib.metadata.version("gymnasium")}

    def trouble(self, what):
        return moto.EpisodeError(f"{self.name}: {what} (at step {self.steps} of an episode); "
                                 "correct the environment")

    def ask(self, method, returns, *args, **kwargs):
        """Call a method of the environment, the last of whose `returns` (None: any) is a dict."""
        try:
            answer = getattr(self.env, method)(*args, **kwargs)
        except Exception as error:
            signature = ("; Gymnasium's reset takes seed and options and returns 2 values, step "
                         "returns 5" if isinstance(error, (TypeError, ValueError)) else "")
            raise self.trouble(f"{method}() failed with {type(error).__name__}: "
                               f"{error}{signature}") from None
        if returns and not (isinstance(answer, tuple) and len(answer) == len(returns.split(", "))
                            and isinstance(answer[-1], dict)):
            raise self.trouble(f"{method}() returned something else than Gymnasium's {returns}")
        return answer

    def number(self, value, name):
        """A finite number as float, from a boolean, a number, or an array of one."""
        with contextlib.suppress(ValueError):             # of a ragged list
            array = np.asarray(value)
            if array.size == 1 and array.dtype.kind in "biuf" and np.isfinite(array).all():
                return float(array.item())
        raise self.trouble(f"step() gave {str(value)[:80]!r} as {name}, where a finite number is "
                           "needed")

    def reset(self, seed):
        self.steps = 0
        seed = int(np.random.default_rng(seed).integers(2 ** 31))
        self.ask("reset", "observation, info", seed=seed)
        return self.render()

    def to_box(self, action):
        """An action (A,) in [-1, 1] -> the box: linearly between floating bounds; of whole numbers,
        each has an equal share of [-1, 1]."""
        low, high, kind = self.low, self.high, self.space.dtype
        share = (np.clip(np.asarray(action, float), -1, 1) + 1) / 2
        if kind.kind != "f":
            return np.minimum(low + np.floor(share * (high - low + 1)), high).astype(kind)
        scaled = ((1 - share) * low + share * high).astype(kind)
        return scaled.clip(self.space.low, self.space.high)            # rounding may have left it

    def step(self, action):
        total, success = 0.0, False
        self.steps += 1
        for _ in range(self.repeat):
            _, reward, terminal, truncated, info = self.ask(
                "step", "observation, reward, terminated, truncated, info", self.to_box(action))
            reward = self.number(reward, "reward")
            terminal = self.number(terminal, "terminated")
            truncated = self.number(truncated, "truncated")
            key = next((key for key in ("success", "is_success") if key in info), None)
            success |= bool(self.number(info[key], key) if key else reward >= 1)
            total += reward
            if terminal or truncated:
                break
        return self.render(), total, bool(terminal), bool(terminal or truncated), success

    def render(self):
        from PIL import Image
        try:
            image = to_rgb(self.ask("render", None))
        except ValueError as error:
            raise self.trouble(f"render() gave {error}") from None
        if self.shape not in (None, image.shape):
            raise self.trouble(f"render() gave a picture of shape {image.shape} after others of "
                               f"{self.shape}")
        self.shape = image.shape
        size = self.size, self.size
        return np.array(Image.fromarray(image).resize(size, Image.Resampling.BOX))
