"""Meta-World for moto.py, and what every MuJoCo task needs: a working OpenGL and a fast camera.
moto.py imports it on demand.
"""
import importlib.metadata
import importlib.util
import os
import subprocess
import sys
import warnings

import numpy as np

import moto
import rollout_workers


def choose_gl():
    """Set MUJOCO_GL before mujoco is imported: as the user wants it, else EGL, else OSMesa. Returns
    "", or, where nothing works, a sentence with cause and remedy."""
    if not sys.platform.startswith("linux") or "mujoco" in sys.modules \
            or rollout_workers.worker:
        return ""
    trial = ("import mujoco; "
             "mujoco.Renderer(mujoco.MjModel.from_xml_string('<mujoco/>'), 8, 8).close()")
    wished = os.environ.get("MUJOCO_GL")
    for backend in [wished] if wished else ["egl", "osmesa"]:
        env = os.environ | {"MUJOCO_GL": backend}         # in a child: a failed import stays failed
        done = subprocess.run([sys.executable, "-c", trial], env=env, capture_output=True)
        if done.returncode == 0:
            os.environ["MUJOCO_GL"] = backend
            return ""
    return ("MuJoCo cannot render: unset MUJOCO_GL and PYOPENGL_PLATFORM, or install an OpenGL "
            "backend (Debian, Ubuntu: apt-get install libegl1 libgl1-mesa-dri, or libosmesa6)")


def need(package, command):
    """Raise moto.UserError where a simulator's package or OpenGL is missing."""
    if importlib.util.find_spec(package) is None:
        raise moto.UserError(f"{package} is not installed; {command}")
    if trouble := choose_gl():
        raise moto.UserError(trouble)


class Camera:
    """Images (P, P, 3) uint8 of a MuJoCo scene; `view`: azimuth, elevation (degrees), distance,
    lookat (m).

    DEPARTURE: no shadows, multisampling and reflections, which are slow in software. Instead each
    pixel is the mean of 2 x 2 rendered ones, which locates a hand to fractions of a pixel."""
    finer = 2

    def __init__(self, cfg, model, data, view):
        import mujoco
        self.data, self.view = data, view
        quality = model.vis.quality
        quality.shadowsize = quality.offsamples = 0       # SHARP: before the renderer is built
        side = self.finer * cfg.image_size
        self.renderer = mujoco.Renderer(model, side, side)
        self.renderer.scene.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = 0
        self.free = mujoco.MjvCamera()
        for name, value in view.items():
            setattr(self.free, name, value)
        self.close = self.renderer.close

    def describe(self):
        """All that decides what an image looks like."""
        from OpenGL import GL
        self.render()                                     # makes its own OpenGL context current
        return {"renderer": GL.glGetString(GL.GL_RENDERER).decode(), "camera": self.view,
                "supersampling": self.finer, "mujoco": importlib.metadata.version("mujoco")}

    def render(self):
        self.renderer.update_scene(self.data, self.free)
        image, n = self.renderer.render().astype(np.uint16), self.finer
        total = sum(image[i::n, j::n] for i in range(n) for j in range(n))
        return (total / n ** 2).round().astype(np.uint8)


class MetaWorld:
    """A Meta-World task seen through the authors' camera, by their baselines' protocol: sparse
    reward (1 while `success` holds), action repeat, new object and goal positions at each reset,
    jittered hand, ten zero actions, no early termination."""
    action_size, terminates, max_demo_reward = 4, False, 1
    view = {"azimuth": 15, "elevation": -22.5, "distance": 0.75, "lookat": [-0.15, 0.65, 0.25]}

    def __init__(self, cfg):
        need("metaworld", "pip install -r requirements.txt")
        from metaworld.env_dict import ALL_V3_ENVIRONMENTS_GOAL_OBSERVABLE as tasks
        from metaworld.policies import ENV_POLICY_MAP as policies
        names = sorted(name.removesuffix("-v3-goal-observable") for name in tasks)
        if cfg.task not in names:
            hint = moto.nearest(cfg.task, [*names, *moto.KITCHENS])
            raise moto.UserError(f"unknown task {cfg.task!r}; {hint}, or gym:ENV_ID")
        warnings.filterwarnings("ignore", "Constant")     # scripted actions leave [-1, 1]: clipped
        self.env = tasks[f"{cfg.task}-v3-goal-observable"](seed=0)
        self.env.seeded_rand_vec, self.env._freeze_rand_vec = True, False
        self.policy_class, self.repeat = policies[f"{cfg.task}-v3"], cfg.action_repeat
        most = (self.env.max_path_length - 10) // cfg.action_repeat
        if cfg.episode_steps > most:
            raise moto.UserError(f"--episode-steps is {cfg.episode_steps} but Meta-World allows "
                                 f"at most {most}")
        self.camera = Camera(cfg, self.env.model, self.env.data, self.view)
        self.render, self.close = self.camera.render, self.camera.close

    def describe(self):
        return self.camera.describe() | {"metaworld": importlib.metadata.version("metaworld")}

    def reset(self, seed):
        rng = np.random.default_rng(seed)
        self.env.seed(int(rng.integers(2 ** 31)))         # SHARP: reset(seed=...) is ignored
        self.env.hand_init_pos = np.array([0.1, 0.5, 0.3]) + 0.02 * rng.standard_normal(3)
        self.env.reset()
        for _ in range(10):
            self.observation, *_ = self.env.step(np.zeros(4, np.float32))
        self.policy = self.policy_class()
        return self.render()

    def step(self, action):
        for _ in range(self.repeat):
            self.observation, _, _, _, info = self.env.step(np.asarray(action, np.float32))
        self.demonstrated = success = bool(info["success"])
        return self.render(), float(success), False, False, success

    def scripted_action(self):
        """The scripted policy's action for the present state, clipped (4,)."""
        observation = self.observation.copy()             # SHARP: door-open's edits its input
        return np.clip(self.policy.get_action(observation), -1, 1)
