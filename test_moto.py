"""Tests of moto.py: every equation against an independent oracle, then data, resuming, errors,
simulator, command line, learning; and of what is in experiments/.

    python -m pytest -q test_moto.py
"""
import copy, dataclasses, importlib.util, inspect, itertools, json, math, os, re, shutil, signal, socket, subprocess, sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributions as D

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))                                                 # for the processes that the tests start
moto = sys.modules.get("moto")
if getattr(moto, "__file__", None) != str(HERE / "moto.py"):         # or it is PyPI's moto
    spec = importlib.util.spec_from_file_location("moto", HERE / "moto.py")
    moto = sys.modules["moto"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(moto)
sys.path.insert(0, str(HERE / "experiments"))
import baselines, bench, franka_kitchen, gym_task, reproduce

TINY = dict(task="gym:test/Dot-v0", device="cpu", precision="float32", workers=1, image_size=16, action_repeat=1, episode_steps=12, batch=4, length=6, channels=4,
            deter=16, stoch=6, hidden=16, ensemble=3, horizon=3, offline_updates=6, online_episodes=2, updates_per_episode=4,
            eval_every=100, final_episodes=2, log_every=1, save_every=1, offline_fraction=0.5, shift=0)


def tiny(**changes):
    return moto.build_config(**(TINY | changes))


def flags(**values):
    return reproduce.flags(values)


def batch_of(cfg, B=4, T=6, A=2, seed=0):
    g = torch.Generator().manual_seed(seed)
    first = torch.zeros(B, T, dtype=torch.bool)
    first[:, 0] = True
    return {"image": torch.randint(0, 255, (B, T, cfg.image_size, cfg.image_size, 3), generator=g, dtype=torch.uint8),
            "a": torch.rand(B, T, A, generator=g) * 1.8 - 0.9, "r": torch.rand(B, T, generator=g), "is_terminal": torch.zeros(B, T),
            "is_first": first, "is_demo": torch.ones(B, T, dtype=torch.bool)}


def prepared(batch):
    return {k: v for k, v in batch.items() if k != "image"} | {"x": moto.to_image(batch["image"])}


@pytest.fixture
def agent():
    return moto.MOTO(tiny(), 2, True, "cpu")


# ------------------------------------------------------------------------------------------------------ the toy task

class Dot:
    """A blob on a 16x16 canvas must reach the ring in the middle within 12 steps. Reward 1 while it is inside."""

    @staticmethod
    def register():
        import gymnasium

        class Environment(gymnasium.Env):
            metadata = {"render_modes": ["rgb_array"], "render_fps": 10}
            action_space = gymnasium.spaces.Box(-2.0, 2.0, (2,), np.float32)   # not [-1, 1]: the mapping matters
            observation_space = gymnasium.spaces.Box(-1, 1, (2,), np.float32)

            def __init__(self, render_mode=None, terminates=False):
                self.render_mode, self.terminates = render_mode, terminates

            def reset(self, seed=None, options=None):
                super().reset(seed=seed)
                angle = self.np_random.uniform(0, 2 * np.pi)
                self.p = 0.85 * np.array([np.cos(angle), np.sin(angle)])
                return self.p.astype(np.float32), {}

            def step(self, action):
                self.p = np.clip(self.p + 0.1 * np.asarray(action), -1, 1)     # 0.2 for a full normalised action
                inside = bool(np.linalg.norm(self.p) < 0.25)
                return self.p.astype(np.float32), float(inside), self.terminates and inside, False, {"success": inside}

            def render(self):
                y, x = np.mgrid[0:16, 0:16] / 7.5 - 1
                blob = np.exp(-((x - self.p[0]) ** 2 + (y - self.p[1]) ** 2) / 0.3)
                ring = (np.hypot(x, y) < 0.25) * 0.5
                return (255 * np.stack([blob, ring, blob], -1)).astype(np.uint8)

        for name, kwargs in (("test/Dot-v0", {}), ("test/DotEnds-v0", {"terminates": True})):
            if name not in gymnasium.registry:
                gymnasium.register(name, lambda render_mode=None, kw=kwargs: Environment(render_mode, **kw))


Dot.register()


def dot_episodes(folder, count, speed=0.4, noise=0.5, seed=0, steps=12, **changes):
    """Successful episodes of a slow and noisy demonstrator, in the documented layout."""
    env, rng, kept, attempt = moto.make_env(tiny(**changes)), np.random.default_rng(seed), 0, 0
    while kept < count:
        image, images, actions, rewards, attempt = env.reset([7, seed, attempt]), [], [], [], attempt + 1
        images.append(image)
        for _ in range(steps):
            p = env.env.unwrapped.p
            a = np.clip(-speed * p / max(np.linalg.norm(p), 0.2) + noise * rng.standard_normal(2), -1, 1)
            image, reward, terminal, over, _ = env.step(a)
            images.append(image), actions.append(a), rewards.append(reward)
            if over:
                break
        if any(rewards):
            moto.save_episode(Path(folder) / f"{kept:03d}.npz", images, actions, rewards, terminal)
            kept += 1
    return folder


@pytest.fixture(scope="module")
def dots(tmp_path_factory):
    return dot_episodes(tmp_path_factory.mktemp("dots"), 6)


# ------------------------------------------------------------------------------------------------------ the equations

def test_eq01_filter_follows_images_and_forgets_at_a_seam(agent):
    x, a = moto.to_image(batch_of(agent.cfg)["image"]), batch_of(agent.cfg)["a"]
    first = torch.zeros(4, 6, dtype=torch.bool)
    first[:, 0] = first[:, 3] = True
    run = lambda x, a: (torch.manual_seed(0), agent.model.observe(x, a, first))[1]
    h, z, mean, std = run(x, a)
    x2, a2 = x.clone(), a.clone()
    x2[:, :3], a2[:, :4] = 0, 0                                               # everything before the seam, and the action into it
    h2, _, mean2, _ = run(x2, a2)
    assert torch.equal(mean[:, 3:], mean2[:, 3:]) and not torch.allclose(mean[:, 1:3], mean2[:, 1:3])
    x3 = x.clone()
    x3[:, 4] = 0                                                              # x_4 changes s_4, nothing before it, and h_4 not at all
    h3, _, mean3, _ = run(x3, a)
    assert torch.equal(mean[:, :4], mean3[:, :4]) and torch.equal(h[:, 4], h3[:, 4])
    assert not torch.allclose(mean[:, 4], mean3[:, 4]) and not torch.allclose(h[:, 5], h3[:, 5])
    assert (std >= 0.1).all()


def test_eq02_heads_are_separate_networks_with_separate_starts():
    net = moto.EnsembleMLP(4, 5, 7, 3, depth=2)
    inp = torch.randn(11, 5)
    out = net(inp)
    W, b = net.first.weight.view(4, 7, 5), net.first.bias.view(4, 7)
    for k in range(4):
        y = torch.nn.functional.silu(inp @ W[k].T + b[k])
        y = torch.nn.functional.silu(y @ net.weights[0][k] + net.biases[0][k])
        torch.testing.assert_close(out[k], y @ net.weights[1][k] + net.biases[1][k])
    assert all(not torch.allclose(out[i], out[j]) for i in range(4) for j in range(i))
    grads = torch.autograd.grad(out[1].sum(), list(net.parameters()))
    assert grads[0].view(4, 7, 5)[[0, 2, 3]].abs().sum() == 0 and grads[0].view(4, 7, 5)[1].abs().sum() > 0
    assert all(g[[0, 2, 3]].abs().sum() == 0 for g in grads[2:])


def test_eq02_a_rollout_draws_a_head_afresh_at_each_step(agent):
    priors = agent.model.priors
    with torch.no_grad():                                                     # head k predicts mean k and the smallest deviation
        for p in priors.weights:
            p.zero_()
        priors.biases[-1][..., :6] = torch.arange(3.0)[:, None, None]
        priors.biases[-1][..., 6:] = -30
    dream = moto.imagine(agent.model, agent.actor, *agent.model.initial(60, "cpu"), 3)
    k = dream["feat"][1:, :, 16:].mean(-1).round().long()
    assert set(k.flatten().tolist()) == {0, 1, 2}
    assert (k[0] != k[1]).any() and (k[1] != k[2]).any()


@pytest.mark.parametrize("head", ["bernoulli", "normal"])
def test_eq03_decoder_losses_are_log_likelihoods(head):
    model = moto.WorldModel(tiny(reward_head=head), 2, True)
    feat, x, r, terminal = torch.randn(5, 22), torch.rand(5, 3, 16, 16) - 0.5, torch.tensor([0., 1, 1, 0, 1]), torch.tensor([0., 0, 0, 0, 1])
    losses = moto.decoder_losses(model, feat, x, r, terminal, torch.arange(5))
    image = -D.Normal(model.decoder(feat), 1.0).log_prob(x).sum((1, 2, 3)) - 3 * 16 * 16 * 0.5 * math.log(2 * math.pi)
    raw = model.reward(feat).squeeze(-1)
    reward = -(D.Bernoulli(logits=raw).log_prob(r) if head == "bernoulli" else D.Normal(raw, 1.0).log_prob(r) + 0.5 * math.log(2 * math.pi))
    torch.testing.assert_close(losses["image"], image.mean(), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(losses["reward"], reward.mean())
    torch.testing.assert_close(losses["continuation"],
                               -D.Bernoulli(logits=model.continuation(feat).squeeze(-1)).log_prob(1 - terminal).mean())
    parts = [moto.decoder_losses(model, feat, x, r, terminal, torch.tensor([i]))["image"] for i in range(5)]
    torch.testing.assert_close(torch.stack(parts).mean(), losses["image"])     # a random subset is unbiased


def test_eq04_model_loss_is_the_sum_of_its_parts_and_reaches_every_parameter(agent):
    cfg = agent.cfg
    torch.manual_seed(0)
    loss, metrics, feat, embed = moto.model_loss(agent.model, prepared(batch_of(cfg)))
    expected = (metrics["model/image"] + cfg.reward_scale * metrics["model/reward"] + metrics["model/kl"]
                + metrics["model/continuation"])
    torch.testing.assert_close(loss.detach(), expected)
    assert feat.shape == (4, 6, 22) and feat.requires_grad
    agent.model.cfg = dataclasses.replace(cfg, free_nats=0.0)
    loss, *_ = moto.model_loss(agent.model, prepared(batch_of(cfg)))
    grads = torch.autograd.grad(loss, list(agent.model.parameters()))          # raises on a parameter that is not used
    assert all(g.abs().sum() > 0 for g in grads)


def test_eq05_kl_against_torch_distributions_and_its_balance():
    g = torch.Generator().manual_seed(0)
    r = lambda *s: torch.randn(*s, generator=g)
    q = [r(4, 6).requires_grad_(), r(4, 6).exp().requires_grad_()]
    p = [r(3, 4, 6).requires_grad_(), r(3, 4, 6).exp().requires_grad_()]
    oracle = D.kl_divergence(D.Independent(D.Normal(*q), 1), D.Independent(D.Normal(*p), 1))
    torch.testing.assert_close(moto.kl_normal(*q, *p), oracle)
    torch.testing.assert_close(moto.kl_balanced(q, p, 0.8, 0.0), oracle)       # the value is balance-free, the gradient is not
    full = torch.autograd.grad(oracle.sum(), [p[0], q[0]], retain_graph=True)
    balanced = torch.autograd.grad(moto.kl_balanced(q, p, 0.8, 0.0).sum(), [p[0], q[0]])
    torch.testing.assert_close(balanced[0], 0.8 * full[0])
    torch.testing.assert_close(balanced[1], 0.2 * full[1])
    clipped = moto.kl_balanced(q, p, 0.8, 1e6)
    assert (clipped == 1e6).all() and torch.autograd.grad(clipped.sum(), q[0])[0].abs().sum() == 0


def test_eq06_disagreement_is_the_spread_of_the_heads():
    means = torch.randn(5, 7, 3)
    torch.testing.assert_close(moto.disagreement(means).numpy(), means.numpy().std(0).mean(-1), rtol=1e-5, atol=1e-6)
    agreed = means[:1].expand(5, 7, 3).clone().requires_grad_()
    assert moto.disagreement(agreed).abs().max() < 1e-5
    moto.disagreement(agreed).sum().backward()
    assert torch.isfinite(agreed.grad).all()


def test_eq06_disagreement_is_higher_off_the_data_after_training():
    """The priors are fitted by Eq 5 to a posterior that is known where the first half of h varies and the rest is zero."""
    torch.manual_seed(0)
    model, W = moto.WorldModel(tiny(), 2, False), torch.randn(8, 6)
    optimiser = torch.optim.Adam(model.priors.parameters(), 3e-3)

    def states(n, known):
        h = torch.rand(n, 16) * 2 - 1
        return torch.cat([h[:, :8], 0 * h[:, 8:]], 1) if known else h

    def u(known):
        return float(moto.disagreement(model.prior(states(500, known))[0]).mean())
    before = u(False) / u(True)
    for _ in range(400):
        h = states(64, True)
        q = torch.sin(h[:, :8] @ W), torch.full((64, 6), 0.3)
        optimiser.zero_grad()
        moto.kl_balanced(q, model.prior(h), 1.0, 0.0).mean().backward()
        optimiser.step()
    assert before < 1.6 and u(False) > 2 * u(True), (before, u(False), u(True))


def test_eq07_penalty():
    r, u = torch.tensor([1.0, 0.0, 0.5]), torch.tensor([0.2, 1.0, 0.1])          # below the data's level 0.25, three times above it, below
    torch.testing.assert_close(moto.penalised_reward(r, u, 0.5, 0.25), torch.tensor([1.0, -1.5, 0.5]))
    assert torch.equal(moto.penalised_reward(r, u, 0.0, 0.25), r)
    u.requires_grad_()
    moto.penalised_reward(r, u, 0.5, 0.25).sum().backward()
    torch.testing.assert_close(u.grad, torch.tensor([0.0, -2.0, 0.0]))                              # below that level nothing pulls


def test_eq07_penalty_enters_what_the_update_pays(monkeypatch):
    def value_with(alpha):
        agent = moto.MOTO(tiny(alpha=alpha), 2, True, "cpu")
        return agent.update(batch_of(agent.cfg))["actor/value"]
    assert value_with(50.0) < value_with(0.0) - 0.01


def test_eq08_imagination_is_on_policy_and_aligned(agent):
    h, z = torch.randn(5, 16), torch.randn(5, 6)
    torch.manual_seed(3)
    dream = moto.imagine(agent.model, agent.actor, h, z, 3)
    assert [tuple(dream[k].shape) for k in ("feat", "a", "logp", "u")] == [(4, 5, 22), (4, 5, 2), (4, 5), (3, 5)]
    assert torch.equal(dream["feat"][0], torch.cat([h, z], -1))
    for i in range(3):                                                        # s^i, a^i give h^{i+1} and u^i
        s = dream["feat"][i]
        nxt = agent.model.recurrence(s[:, :16], s[:, 16:], dream["a"][i])
        torch.testing.assert_close(nxt, dream["feat"][i + 1][:, :16])
        torch.testing.assert_close(moto.disagreement(agent.model.prior(nxt)[0]), dream["u"][i])
    torch.testing.assert_close(agent.actor(dream["feat"][2]).log_prob(dream["a"][2]), dream["logp"][2], rtol=1e-3, atol=1e-3)
    grads = torch.autograd.grad(dream["feat"][-1].sum(), list(agent.actor.parameters()))
    assert all(g.abs().sum() > 0 for g in grads)                              # straight through the model


@pytest.mark.parametrize("lam", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("H", [0, 1, 4])
def test_eq09_value_expansion_against_a_naive_loop(lam, H):
    g = torch.Generator().manual_seed(1)
    r, d, q = torch.rand(H, 3, generator=g), torch.rand(H, 3, generator=g), torch.rand(H + 1, 3, generator=g)

    def n_step(i, n):                                                         # n rewards, then Q
        total, product = torch.zeros(3), torch.ones(3)
        for j in range(i, i + n):
            total, product = total + product * r[j], product * d[j]
        return total + product * q[i + n]
    V = moto.value_expansion(r, d, q, lam)
    assert V.shape == (H + 1, 3)
    for i in range(H + 1):
        left = H - i
        mixed = sum((1 - lam) * lam ** (n - 1) * n_step(i, n) for n in range(1, left)) + lam ** max(left - 1, 0) * n_step(i, left)
        torch.testing.assert_close(V[i], mixed)


def test_eq10_target_uses_the_reward_of_arrival_and_knows_a_time_limit_from_an_end():
    r, V0 = torch.tensor([[9., 1, 2]]), torch.tensor([[100., 10, 20]])
    torch.testing.assert_close(moto.critic_target(r, torch.tensor([[0., 0, 0]]), V0, 0.5), torch.tensor([[6., 12]]))
    torch.testing.assert_close(moto.critic_target(r, torch.tensor([[0., 0, 1]]), V0, 0.5), torch.tensor([[6., 2]]))


def test_eq11_critic_loss(agent):
    q, y, w = torch.rand(2, 4, 3, requires_grad=True), torch.rand(4, 3, requires_grad=True), (torch.rand(4, 3) > 0.5).float()
    loss = moto.critic_loss(q, y, w, 50.0)
    expected = sum(((q[k] - y) ** 2 * w).sum() / w.sum() for k in (0, 1)) / 2500
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert y.grad is None and q.grad.abs().sum() > 0
    out = agent.critic(torch.randn(4, 3, 22), torch.randn(4, 3, 2))
    assert out.shape == (2, 4, 3) and not torch.allclose(out[0], out[1])


def test_eq11_the_smaller_critic_bootstraps(agent):
    with torch.no_grad():
        agent.target.nets.biases[-1][1] += 1000
    assert abs(agent.update(batch_of(agent.cfg))["actor/value"]) < 100


def test_eq11_real_and_imagined_transitions_both_train_the_critic():
    def critics(updates=1, **changes):
        agent = moto.MOTO(tiny(**changes), 2, True, "cpu")
        for _ in range(updates):
            agent.update(batch_of(agent.cfg))
        return torch.cat([p.flatten() for p in agent.critic.parameters()])
    both, imagined, untrained = critics(), critics(real_weight=0.0), critics(updates=0)
    assert not torch.equal(both, imagined) and not torch.equal(imagined, untrained)


def test_eq12_target_is_a_moving_average(agent):
    old = copy.deepcopy(agent.target)
    agent.update(batch_of(agent.cfg))
    for before, after, fast in zip(old.parameters(), agent.target.parameters(), agent.critic.parameters()):
        torch.testing.assert_close(after, 0.9 * before + 0.1 * fast)
        assert not torch.equal(before, after)


def test_eq13_behaviour_loss_is_the_likelihood_of_the_leaving_action(agent):
    feat, a = torch.randn(2, 5, 22), torch.rand(2, 5, 2) * 1.8 - 0.9
    w = torch.tensor([[1., 1, 0, 1], [0, 1, 1, 1]])
    policy = agent.actor(feat)
    by_hand = sum(-w[b, t] * D.TransformedDistribution(D.Normal(policy.mean[b, t], policy.std[b, t]), [D.TanhTransform()])
                  .log_prob(a[b, t + 1]).sum() for b in range(2) for t in range(4)) / w.sum()
    torch.testing.assert_close(moto.behaviour_loss(agent.actor, feat, a, w), by_hand, rtol=1e-4, atol=1e-4)
    assert torch.isfinite(moto.behaviour_loss(agent.actor, feat, torch.ones(2, 5, 2), w))
    assert moto.behaviour_loss(agent.actor, feat, a, 0 * w) == 0


def test_eq13_only_offline_actions_are_cloned_and_seams_are_not(agent):
    batch = batch_of(agent.cfg)
    assert agent.update(batch | {"is_demo": torch.zeros(4, 6, dtype=torch.bool)})["actor/behaviour_nll"] == 0
    assert agent.update(batch)["actor/behaviour_nll"] != 0
    assert agent.update(batch | {"is_first": torch.ones(4, 6, dtype=torch.bool)})["actor/behaviour_nll"] == 0


def test_eq14_actor_loss_and_its_limits():
    V0, logp, w, b = torch.rand(6), torch.rand(6), torch.ones(6), torch.tensor(3.0)
    cfg = tiny(beta=0.7, eta=0.1, gamma=0.9)
    torch.testing.assert_close(moto.actor_loss(V0, b, logp, w, cfg), -V0.mean() * 0.1 + 0.7 * b + 0.1 * logp.mean())
    torch.testing.assert_close(moto.actor_loss(V0, b, logp, w, tiny(beta=0.0, eta=0.0, gamma=0.9)), -V0.mean() * 0.1)


def test_eq14_following_the_loss_raises_the_imagined_value():
    agent = moto.MOTO(tiny(beta=0.0, bc_repr_weight=0.0, eta=0.0, model_lr=1e-12, critic_lr=1e-12, actor_lr=1e-2, alpha=0.0), 2, True, "cpu")
    with torch.no_grad():                                                     # a critic with opinions
        agent.critic.nets.first.weight *= 10
        agent.target.load_state_dict(agent.critic.state_dict())
    values = [agent.update(batch_of(agent.cfg))["actor/value"] for _ in range(30)]
    assert np.mean(values[-5:]) > np.mean(values[:5]) + 0.01


@pytest.mark.parametrize("mean,std", [(0.0, 1.0), (1.5, 0.4), (-0.3, 2.0)])
def test_eq15_density_integrates_to_one_and_matches_the_sample(mean, std):
    policy = moto.TanhNormal(torch.full((1,), mean, dtype=torch.float64), torch.full((1,), std, dtype=torch.float64))
    n = torch.linspace(mean - 9 * std, mean + 9 * std, 200_001, dtype=torch.float64)
    a = torch.tanh(n.clamp(-17, 17))
    inside = a.abs() < 1
    density = policy.log_prob(a[inside][:, None]).exp()
    assert abs(torch.trapezoid(density, a[inside]) - 1) < 1e-3
    a, logp = policy.rsample(torch.tensor([0.7], dtype=torch.float64))
    torch.testing.assert_close(policy.log_prob(a), logp)
    assert torch.isfinite(moto.TanhNormal(torch.zeros(1), torch.ones(1)).rsample(torch.tensor([40.0]))[1])


def random_mdp(rng, X=6, A=3, K=5, blur=0.3):
    P = rng.dirichlet(np.ones(X) * 0.5, (X, A))
    P_hat = (1 - blur) * P + blur * rng.dirichlet(np.ones(X), (X, A))
    return P, P_hat, rng.random((X, A)), np.ones(X) / X


def test_eq16_bound_holds_when_u_bounds_the_error_and_can_fail_when_not():
    rng, gamma, tight = np.random.default_rng(0), 0.9, []
    for _ in range(30):
        P, P_hat, r, start = random_mdp(rng)
        u = np.abs(P - P_hat).sum(-1)
        alpha = gamma * r.max() / (1 - gamma)
        J, bound, condition = moto.tabular_bound(P, P_hat, r, u, alpha, gamma, moto.tabular_optimum(P, r, gamma), start)
        assert condition and J >= bound - 1e-9
        J, bound, condition = moto.tabular_bound(P, P_hat, r, 0 * u, alpha, gamma, moto.tabular_optimum(P, r, gamma), start)
        assert not condition
        tight.append(J < bound - 1e-6)
    assert any(tight)                                                         # without uncertainty the promise is broken


def test_eq16_tabular_values_against_a_rollout():
    P, _, r, start = random_mdp(np.random.default_rng(1))
    pi, state, total = np.full((6, 3), 1 / 3), start.copy(), 0.0
    for t in range(400):
        total += 0.9 ** t * (state[:, None] * pi * r).sum()
        state = np.einsum("x,xa,xay->y", state, pi, P)
    assert abs(total - start @ moto.tabular_value(P, r, pi, 0.9)) < 1e-8


def test_equation_ids_are_the_same_everywhere():
    in_code = set(map(int, re.findall(r'^ *"""Eq (\d+)', (HERE / "moto.py").read_text(), re.M)))
    in_tests = {int(n) for n in re.findall(r"def test_eq(\d+)_", Path(__file__).read_text())}
    assert in_code == in_tests == set(range(1, 17))
    notebook = HERE / "moto_walkthrough.ipynb"
    if notebook.exists():
        text = "".join(line for c in json.loads(notebook.read_text())["cells"] if c["cell_type"] == "markdown" for line in c["source"] + ["\n"])
        assert set(map(int, re.findall(r"^#+ Eq (\d+)", text, re.M))) == in_code


# ------------------------------------------------------------------------------------------------------ the update

def snapshot(agent):
    return {name: torch.cat([p.detach().flatten().clone() for p in module.parameters()]) for name, module in agent.modules.items()}


def test_each_loss_moves_its_own_parameters_and_no_others(agent):
    step, seen = agent.step, []

    def watched(loss, *names):
        before = snapshot(agent)
        norms = step(loss, *names)
        after = snapshot(agent)
        assert {n for n in before if not torch.equal(before[n], after[n])} == set(names)
        assert all(norms[f"grad/{name}"] > 0 for name in names)
        seen.append(names)
        return norms
    agent.step = watched
    agent.update(batch_of(agent.cfg))
    assert seen == [("model",), ("actor", "critic")]


def test_one_backward_pass_gives_actor_and_critic_their_own_gradients_alone(agent):
    """The sum of both losses is differentiated once: neither loss may reach the other's parameters, nor the model's."""
    batch = batch_of(agent.cfg)
    batch |= {"valid": torch.ones(4, 5), "bc_mask": torch.ones(4, 5), "bc_target": batch["a"]}
    feat = torch.randn(4, 6, agent.cfg.deter + agent.cfg.stoch)
    parts = {}
    true_actor_loss, true_critic_loss = moto.actor_loss, moto.critic_loss
    moto.actor_loss = lambda *args: parts.setdefault("actor", true_actor_loss(*args))
    moto.critic_loss = lambda *args: parts.setdefault(
        f"critic {'imagined' if 'critic real' in parts else 'real'}", true_critic_loss(*args))
    try:
        with moto.frozen(agent.model):
            agent.policy_terms(feat, feat, batch)
    finally:
        moto.actor_loss, moto.critic_loss = true_actor_loss, true_critic_loss
    reached = {}
    for name, loss in parts.items():
        for module in agent.modules.values():
            module.zero_grad()
        loss.backward(retain_graph=True)
        reached[name] = {n for n, m in agent.modules.items() if any(p.grad is not None and p.grad.any() for p in m.parameters())}
    assert reached == {"actor": {"actor"}, "critic real": {"critic"},
                       "critic imagined": {"critic"}}


def test_the_behaviour_gradient_reaches_the_representation_only_by_its_weight():
    def model_after(**changes):
        agent = moto.MOTO(tiny(**changes), 2, True, "cpu")
        agent.update(batch_of(agent.cfg))
        return snapshot(agent)["model"]
    assert not torch.equal(model_after(bc_repr_weight=1.0), model_after(bc_repr_weight=0.0))
    assert torch.equal(model_after(bc_repr_weight=0.0, beta=1.0), model_after(bc_repr_weight=0.0, beta=0.0))


def test_a_variant_is_a_change_of_numbers():
    fields = {f.name for f in dataclasses.fields(moto.Config)}
    for name, changes in moto.VARIANTS.items():
        assert set(changes) <= fields
        agent = moto.make_agent(tiny(variant=name), 2, True, "cpu")
        assert type(agent) is {"bc": moto.BC, "iql": baselines.IQL, "cql": baselines.CQL,
                               "sac": baselines.SAC}.get(name, moto.MOTO)
        before = snapshot(agent)
        agent.update(batch_of(agent.cfg))
        moved = {n for n, v in snapshot(agent).items() if not torch.equal(v, before[n])}
        assert moved == {"bc": {"encoder", "actor", "ema_policy"}, "iql": {"encoder", "actor", "ema_policy", "critic", "target", "value"}}.get(
            name, {"encoder", "actor", "ema_policy", "critic", "target", "log_tau"} if name in ("cql", "sac") else
            {"model", "actor", "ema_policy", "critic", "target"}), name


def test_a_task_has_its_own_budget_between_preset_and_variant():
    build = lambda **given: moto.build_config(device="cpu", **given)
    plain, hard = build(task="drawer-open"), build(task="assembly")
    assert {name for name in moto.EXACT if getattr(hard, name) != getattr(plain, name)} == set(moto.EXACT)
    assert build(task="hammer", variant="bc").online_episodes == 0 and build(task="hammer", online_episodes=7).online_episodes == 7
    for preset in ("debug", "paper"):                                # these budgets are their own
        assert build(task="hammer", preset=preset).offline_updates == moto.PRESETS[preset]["offline_updates"]
    known = {f.name for f in dataclasses.fields(moto.Config)}
    assert all(set(changes) <= known for table in (moto.TASKS, moto.TUNED) for tasks in table.values() for changes in tasks.values())
    assert all(build(task=task).online_episodes <= 400 for task in moto.TASKS["laptop"])
    for preset in moto.PRESETS:                                      # but the kitchen is the kitchen at any scale
        cfg = build(task="kitchen-mixed", preset=preset)
        assert (cfg.action_repeat, cfg.episode_steps, cfg.reward_head) == (1, 280, "normal")


def test_what_sets_a_variant_apart_changes_the_update_and_the_rest_is_one_method():
    """With the other variants' numbers put back by hand each is moto again, bit for bit; without, each moves something differently."""
    def after(**changes):
        agent = moto.make_agent(tiny(alpha=50.0, **changes), 2, True, "cpu") if "variant" not in changes else moto.make_agent(
            tiny(**({"alpha": 50.0} | moto.VARIANTS[changes["variant"]] | changes)), 2, True, "cpu")
        torch.manual_seed(1)
        agent.update(batch_of(agent.cfg))
        return snapshot(agent)
    whole, kept = after(), dict(alpha=50.0, beta=moto.Config.beta, bc_repr_weight=moto.Config.bc_repr_weight, real_weight=1.0)
    for name, same in (("no-unc", {"model"}), ("no-bc", {"critic"}), ("no-bc-no-unc", set()), ("dreamerv2", set())):
        mine, restored = after(variant=name), after(variant=name, **kept)
        assert {n for n in whole if torch.equal(mine[n], whole[n])} - {"target"} == same - ({"critic"} if name == "no-bc" else set()), name
        assert all(torch.equal(restored[n], whole[n]) for n in whole), name


def test_replacing_a_function_of_the_module_changes_the_agent(monkeypatch, agent):
    twin = moto.MOTO(agent.cfg, 2, True, "cpu")
    torch.manual_seed(5), agent.update(batch_of(agent.cfg))
    original = moto.actor_loss
    monkeypatch.setattr(moto, "actor_loss", lambda V0, *rest: -original(V0, *rest))
    torch.manual_seed(5), twin.update(batch_of(agent.cfg))
    assert not torch.equal(snapshot(agent)["actor"], snapshot(twin)["actor"])


def test_the_weights_that_act_follow_the_trained_ones(agent):
    agent.update(batch_of(agent.cfg))
    assert all(torch.equal(a, b) for a, b in zip(agent.ema_policy.actor.parameters(), agent.actor.parameters()))    # the first is taken whole
    for rate in (10 / 11, 10 / 12):
        old = copy.deepcopy(agent.ema_policy)
        agent.update(batch_of(agent.cfg))
        for name in ("model", "actor"):
            for before, after, fast in zip(getattr(old, name).parameters(), getattr(agent.ema_policy, name).parameters(), agent.modules[name].parameters()):
                torch.testing.assert_close(after, (1 - rate) * before + rate * fast)
    image = np.zeros((16, 16, 3), np.uint8)
    before, _ = agent.ema_policy.act(image)
    with torch.no_grad():
        for p in agent.actor.parameters():
            p.zero_()                                                         # not the ones that act
    assert np.array_equal(agent.ema_policy.act(image)[0], before) and np.abs(before).sum() > 0


def after_updates(cfg, compiled=False, count=3):
    """Metrics and weights after some updates from one set of weights, one batch and one stream of random numbers."""
    agent = moto.MOTO(cfg, 2, True, "cpu", compiled)
    torch.manual_seed(5)
    metrics = [agent.update(batch_of(cfg, T=2)) for _ in range(count)]         # short: compiling unrolls the steps
    return metrics, torch.cat([p.detach().flatten() for p in agent.modules["model"].parameters()]), agent


@pytest.mark.parametrize("precision,compiled,tolerance", [("bfloat16", False, 0.03), ("float32", True, 1e-4), ("bfloat16", True, 0.03)])
def test_the_fast_forms_agree_with_the_plain_one(precision, compiled, tolerance):
    """bfloat16 and torch.compile against float32, eager: every metric of three updates, and their sum in the weights. Tolerances are relative (for metrics near zero: to 0.1); float32 differs by rounding, bfloat16 keeps 8 bits."""
    import torch._inductor
    sizes = dict(hidden=32, deter=32, horizon=1)
    plain, weights, agent = after_updates(tiny(precision="float32", **sizes))
    with torch._inductor.config.patch(fallback_random=True):                    # the same random numbers as eager
        fast, moved, other = after_updates(tiny(precision=precision, **sizes), compiled)
    for ours, theirs in zip(fast, plain):
        for name in theirs:
            assert abs(ours[name] - theirs[name]) <= tolerance * max(0.1, abs(theirs[name])), name
    start = torch.cat([p.detach().flatten() for p in moto.MOTO(tiny(**sizes), 2, True, "cpu").modules["model"].parameters()])
    cosine = torch.cosine_similarity(moved - start, weights - start, dim=0)     # Adam turns tiny gradients into whole steps
    assert cosine > (0.999 if precision == "float32" else 0.9)


def test_training_is_deterministic():
    def train():
        agent = moto.MOTO(tiny(), 2, True, "cpu")
        for i in range(3):
            agent.update(batch_of(agent.cfg, seed=i))
        return snapshot(agent)
    a, b = train(), train()
    assert all(torch.equal(a[n], b[n]) for n in a)


# ------------------------------------------------------------------------------------------------------ data

class Echo:
    """The image shows the action that led into it, and the reward is its first number: an off-by-one cannot hide."""
    action_size, terminates = 2, True

    def __init__(self, ends):
        self.ends = ends

    def show(self, a):
        return np.full((16, 16, 3), int(round((a[0] + 1) * 100)), np.uint8)

    def reset(self, seed):
        self.t = 0
        return self.show([0.0])

    def step(self, a):
        self.t += 1
        return self.show(a), float(a[0]), self.ends and self.t == 5, self.t == 5, self.t == 2


def test_evaluations_act_by_means_and_with_eval_stochastic_as_collection_does(agent):
    """The policy's mean at the state it is in; or, the same each time, noise that no two episodes share."""
    def actions(**changes):
        cfg = dataclasses.replace(agent.cfg, **changes)
        kept = moto.evaluate(cfg, moto.RolloutWorkers(cfg, Echo(False)), agent, 2)[1]
        return [np.array(episode["action"]) for episode in kept], kept[0]["image"][0]
    means, image = actions()
    (one, two), again = actions(eval_stochastic=True)[0], actions(eval_stochastic=True)[0]
    np.testing.assert_array_equal([one, two], again)
    assert np.abs(one - two).min() > 1e-3                                         # no two share their noise
    np.testing.assert_array_equal(means[0], means[1])
    np.testing.assert_array_equal(means[0][0], agent.ema_policy.act(image)[0])


@pytest.mark.parametrize("variant", ["moto", "bc"])
def test_explore_scales_the_deviation_of_sampled_actions_and_nothing_else(variant):
    """With the same noise, the action's distance from the mean, before the tanh, is in proportion; the latent is sampled as ever."""
    image = np.random.default_rng(0).integers(0, 255, (16, 16, 3), dtype=np.uint8)

    def act(share):
        acting = moto.make_agent(tiny(variant=variant, action_noise_scale=share), 2, False, "cpu").ema_policy
        a, state = acting.act(image, generator=torch.Generator().manual_seed(7))
        return np.arctanh(a.astype(float)), state[1 if variant == "moto" else 0]
    (none, z), (half, z_half), (whole, z_whole) = act(0.0), act(0.5), act(1.0)
    np.testing.assert_allclose(half - none, (whole - none) / 2, atol=1e-4)
    assert np.abs(whole - none).min() > 0.01
    assert torch.equal(z, z_half) and torch.equal(z, z_whole)


@pytest.mark.parametrize("name", ["drawer-open", "kitchen-partial"])
def test_a_published_agent_opens_with_the_settings_it_was_made_with(name, monkeypatch):
    """Whatever its task's preset sets today."""
    monkeypatch.setattr(moto, "Run", lambda cfg, acting: cfg)
    folder = HERE / "experiments/agents" / name
    config = json.loads((folder / "config.json").read_text())["config"]
    opened = dataclasses.asdict(moto.open_run(folder))
    assert moto.differences(config, opened, {"logdir", "device", "workers"}) == {}
    agent = torch.load(folder / "agent.pt", map_location="cpu", weights_only=True)
    online = opened["online_episodes"] * opened["updates_per_episode"]
    assert agent["updates"] == opened["offline_updates"] + online


@pytest.mark.parametrize("ends", [True, False])
def test_what_an_evaluation_returned_is_comparable_with_what_the_critics_promised(agent, ends):
    """Up to a time limit, and as if the last reward went on for ever: after a terminal there is nothing."""
    result, (episode,) = moto.evaluate(agent.cfg, moto.RolloutWorkers(agent.cfg, Echo(ends)), agent, 1)
    gamma, rewards = agent.cfg.gamma, np.array(episode["reward"], float)
    on = np.append(rewards, np.full(2000, 0 if ends else rewards[-1]))
    np.testing.assert_allclose(result["return"], (1 - gamma) * (gamma ** np.arange(5) @ rewards), atol=1e-6)
    np.testing.assert_allclose(result["infinite_horizon_return"], (1 - gamma) * (gamma ** np.arange(2005) @ on), atol=1e-6)


@pytest.mark.parametrize("ends", [True, False])
def test_action_image_reward_alignment_and_time_limits(agent, tmp_path, ends):
    cfg, store = agent.cfg, moto.Replay(40, 16, 2)
    for i in range(3):
        episode = moto.rollout(cfg, Echo(ends), agent.ema_policy, i, sample=True)
        assert len(episode["action"]) == 5 and episode.pop("success") is True    # once is enough
        moto.save_episode(tmp_path / f"{i}.npz", **episode)
        store.add(moto.load_episode(tmp_path / f"{i}.npz", 16, 2), True)
    assert store.size == 18 and store.data["is_first"].nonzero().flatten().tolist() == [0, 6, 12]
    batch = store.sample(np.random.default_rng(0), 50, 7)
    np.testing.assert_allclose(batch["a"][..., 0], batch["r"])
    np.testing.assert_array_equal(batch["image"][..., 0, 0, 0], np.round((batch["a"][..., 0].numpy().astype(float) + 1) * 100))
    assert store.data["is_terminal"][:18].nonzero().flatten().tolist() == ([5, 11, 17] if ends else [])
    seams = store.data["is_first"][:18]
    assert not store.data["r"][:18][seams].any() and not store.data["a"][:18][seams].any()


def test_replay_is_uniform_over_positions_and_mixes_as_told():
    store, rng = moto.Replay(90, 16, 1), np.random.default_rng(0)

    def add(n, part):
        store.add({"image": np.full((n, 16, 16, 3), part == "offline", np.uint8),
                   "action": np.linspace(0, 1, n - 1)[:, None], "reward": np.arange(n - 1), "terminal": False},
                  part == "offline", part)
    add(30, "offline")
    cfg, offline = tiny(batch=8, offline_fraction=0.25), lambda batch: int(batch["image"][:, 0, 0, 0, 0].sum())
    assert offline(moto.sample_batch(cfg, rng, store)) == 8
    batch = store.sample(rng, 20_000, 5)
    assert batch["is_first"][:, 0].all() and not batch["is_first"][:, 1:].any()      # every sequence starts afresh; one long episode
    counts = np.unique(batch["r"][:, 1], return_counts=True)[1]
    assert len(counts) == 26 and counts.min() > 0.8 * counts.mean() and counts.max() < 1.2 * counts.mean()
    add(60, "online")
    assert offline(moto.sample_batch(cfg, rng, store)) == 2
    counts = np.unique(store.sample(rng, 20_000, 5, "online")["r"][:, 1], return_counts=True)[1]
    assert len(counts) == 56 and counts.min() > 0.7 * counts.mean()
    store.join(30, np.arange(10) > 4)                             # its first eleven images; six to ten are imitated
    batch = store.sample(rng, 20_000, 5)
    starts = np.unique(batch["r"][~batch["image"][:, 0, 0, 0, 0].bool(), 1])
    assert starts.tolist() == list(range(11))                     # now drawn as offline data, too
    assert batch["is_demo"][~batch["image"][:, 0, 0, 0, 0].bool()].any()
    assert not store.sample(rng, 20_000, 5, "online")["is_demo"].any()
    assert store.data["image"].dtype == torch.uint8 and len(store.data["image"]) == 90       # held once


def test_successful_online_episodes_join_the_offline_data(dots, tmp_path, monkeypatch):
    monkeypatch.setattr(moto, "DEMO_TAIL", 2)
    run = moto.Run(tiny(data=str(dots), logdir=str(tmp_path), online_episodes=5))
    run.open_data()
    slowest = max(int(np.argmax(moto.load_episode(path, 16, 2)["reward"])) for path in dots.glob("*.npz"))
    assert run.demo_threshold == pytest.approx(1 - slowest / 12)                              # of 12 steps, those from the first success on
    run.demo_threshold, before, choices = 1 / 12, run.replay.size, lambda: len(run.replay.starts["offline"])
    for index, rewards in enumerate(([0] * 12, [0, 0, 0, 1, 0, 1, 0, 0, 0, 0, 0, 0], [0] * 11 + [1])):
        image = np.full((13, 16, 16, 3), index, np.uint8)
        moto.save_episode(run.episode_path(index), image, np.full((12, 2), index / 10), rewards)
        run.add_online(index)
    assert run.replay.size == before + 39 and choices() == before + (7 + 13)     # 4 + 2 actions; 12: the whole
    assert len(run.replay.data["image"]) == before + 5 * 13                                # room for each episode once
    joined = run.replay.starts["offline"][before:]
    joined = {name: values[joined] for name, values in run.replay.data.items()}
    assert joined["r"].nonzero().flatten().tolist() == [4, 6, 19] and joined["is_first"].nonzero().flatten().tolist() == [0, 7]
    assert set(joined["image"][:7].unique().tolist()) == {1} and joined["a"][1:7].unique().tolist() == [pytest.approx(0.1)]
    assert joined["is_demo"].tolist() == [False] + [True] * 6 + [False] + [True] * 12
    size, run.demo_threshold = choices(), 2 / 12                                              # too slow for the prior, by one step
    run.add_online(2)
    assert choices() == size
    run.demo_threshold = 1 / 12
    run.add_online(2)
    assert choices() == size + 13
    run.close()


def test_the_worth_of_an_episode_and_which_of_its_actions_lead_up():
    """Worth: the mean reward up to the time limit had it kept its largest from the first time on. Actions lead up if no more than `imitate_ahead` of them,
    since the last time or since the start, bring more than there ever was; what was lost and is back does not count, nor does what comes after."""
    for reward, worth, peak, ahead_2, ahead_3 in (([0, 0, 0, 0], 0, 0, "....", "...."), ([0, 1, 1], 11, 1, "xx.", "xx."), ([1, 1], 12, 0, "x.", "x."),
                                                  ([0, 0, 0, 2], 18, 3, "....", "...."), ([1, 1, 0], 12, 0, "x..", "x.."), ([0, 0, 1, 2], 19, 3, "...x", "xxxx"),
                                                  ([0, 1, 0, 1, 1, 2, 0, 3, 3], 20, 7, "xx....xx.", "xx....xx.")):
        rewards = np.array(reward, np.float32)
        mean, at = moto.episode_score(tiny(), rewards)
        assert (round(12 * mean), at) == (worth, peak), reward
        for ahead, marks in ((2, ahead_2), (3, ahead_3), (0, "x" * len(reward))):
            assert moto.progress_mask(tiny(imitate_ahead=ahead), rewards).tolist() == [mark == "x" for mark in marks], (reward, ahead)


@pytest.mark.parametrize("ahead", [0, 4])
def test_the_behaviour_term_imitates_what_leads_up(tmp_path, ahead):
    """The action is told from its neighbours by its value. The rest is in the model's and the critics' data all the same; what online is
    as good as the worst demonstration of those that earn the most joins, and of it, too, what leads up is imitated."""
    for index, reward in enumerate([[0, 0, 0, 0], [0, 0, 0, 1, 1], [1, 1, 0, 0, 0, 0, 2]]):  # worth, of 12 steps: 0, 9, 14
        moto.save_episode(tmp_path / f"{index}.npz", np.zeros((len(reward) + 1, 16, 16, 3), np.uint8),
                          0.1 * index + 0.01 * np.arange(len(reward))[:, None].repeat(2, 1), reward)
    run = moto.Run(tiny(data=str(tmp_path), logdir=str(tmp_path / "run"), online_episodes=3, imitate_ahead=ahead, reward_head="normal"))
    run.open_data()
    assert run.replay.size == 19
    for index, reward in enumerate(([0] * 4 + [1] + [0] * 7, [0] * 2 + [1] * 9 + [2], [0] * 3 + [2] + [1] * 8)):          # worth 8, 11, 18
        moto.save_episode(run.episode_path(index), np.zeros((13, 16, 16, 3), np.uint8), 0.5 + 0.1 * index + 0.01 * np.arange(12)[:, None].repeat(2, 1), reward)
        run.add_online(index)
    offline = run.replay.starts["offline"]
    assert len(offline) == 19 + 13
    batch = {name: values[None, offline] for name, values in run.replay.data.items()}
    batch = run.agent.prepare_batch(batch)
    imitated = (100 * batch["bc_target"][:, 1:, 0][batch["bc_mask"] > 0]).round().int().tolist()
    if ahead:
        assert imitated == [10, 11, 12, 13, 20, 70, 71, 72, 73]
    else:
        assert imitated == [0, 1, 2, 3, 10, 11, 12, 13, 14, *range(20, 27), *range(70, 82)]
    run.close()


def test_gym_actions_are_mapped_to_the_box_and_seeds_fix_the_episode():
    env = moto.make_env(tiny())
    first = env.reset([1, 2, 3])
    p = env.env.unwrapped.p.copy()
    env.step(np.array([1.0, -0.5]))
    np.testing.assert_allclose(env.env.unwrapped.p - p, [0.2, -0.1], atol=1e-6)
    assert np.array_equal(first, env.reset([1, 2, 3])) and not np.array_equal(first, env.reset([1, 2, 4]))
    assert first.shape == (16, 16, 3) and first.dtype == np.uint8


def test_a_terminal_task_learns_its_continuation(tmp_path):
    dot_episodes(tmp_path, 4, speed=1.0, noise=0.1, task="gym:test/DotEnds-v0")
    episodes = [moto.load_episode(p, 16, 2) for p in sorted(tmp_path.glob("*.npz"))]
    assert all(e["terminal"] and e["reward"][-1] == 1 for e in episodes)
    cfg = tiny(task="gym:test/DotEnds-v0", model_lr=3e-3, channels=8, hidden=32, deter=32)
    store = moto.Replay(200, 16, 2)
    for e in episodes:
        store.add(e, True)
    agent, rng = moto.MOTO(cfg, 2, True, "cpu"), np.random.default_rng(0)
    losses = [agent.update(store.sample(rng, 8, 5))["model/continuation"] for _ in range(300)]
    assert np.mean(losses[-30:]) < 0.3 * np.mean(losses[:30])


# ------------------------------------------------------------------------------------------------------ the baselines

def test_frames_are_stacked_within_an_episode():
    image = torch.arange(2 * 7, dtype=torch.uint8).reshape(2, 7, 1, 1, 1).expand(2, 7, 4, 4, 3).contiguous()
    first = torch.zeros(2, 7, dtype=torch.bool)
    first[:, 0] = first[0, 3] = first[1, 5] = first[1, 6] = True
    got = moto.stacked(image, first, 3)
    assert got.shape == (2, 5, 4, 4, 9)
    for b in range(2):
        for t in range(2, 7):
            begins = max([s for s in range(1, t + 1) if first[b, s]], default=0)           # the first step in view is not one
            assert got[b, t - 2, 0, 0, ::3].tolist() == [int(image[b, max(t - n, begins), 0, 0, 0]) for n in (2, 1, 0)]
    assert torch.equal(moto.stacked(image, first, 1), image)


@pytest.mark.parametrize("memory", [0, 1, 3, 20])
def test_acting_filters_the_last_images_as_training_filters_a_sequence(memory):
    """Those of the last `memory` steps, forgetting what was before, action and state; 0, or more than there were: all since the reset."""
    agent = moto.MOTO(tiny(context=memory), 2, True, "cpu")
    images, actions, state = batch_of(agent.cfg, 1, 8)["image"][0], [torch.zeros(2)], None
    for t in range(8):
        since = max(0, t + 1 - (memory or 8))
        first = torch.tensor([[True] + [False] * (t - since)])
        with torch.no_grad():
            h, z, *_ = agent.model.filter(agent.model.embed(moto.to_image(images[None, since:t + 1])), torch.stack(actions[since:])[None], first, scale=0)
            expected = agent.actor(torch.cat([h, z], -1)[0, -1:]).mode[0]
        a, state = agent.ema_policy.act(images[t], state)
        np.testing.assert_allclose(a, expected, atol=1e-6)
        actions.append(torch.as_tensor(a))


def test_acting_stacks_the_frames_as_training_does():
    agent = moto.make_agent(tiny(variant="bc"), 2, False, "cpu")
    image, state = torch.randint(0, 255, (5, 16, 16, 3), dtype=torch.uint8), None
    padded = torch.cat([image[:1], image[:1], image])[None]                                # as at a reset
    feat = agent.ema_policy.model(moto.to_image(moto.stacked(padded, torch.zeros(1, 7, dtype=torch.bool), 3)[0]))
    for t in range(5):
        a, state = agent.ema_policy.act(image[t].numpy(), state)
        np.testing.assert_allclose(a, agent.ema_policy.actor(feat[t]).mode, atol=1e-5)


@pytest.mark.parametrize("steps", [(), (5,)])
def test_random_shifts_move_each_image_or_sequence_as_a_whole(steps):
    torch.manual_seed(0)
    image = torch.randint(0, 255, (40, *steps, 16, 16, 3), dtype=torch.uint8)
    moved = moto.random_shift(image, 2)
    assert moved.shape == image.shape and moved.is_contiguous()
    flat = image.flatten(0, -4).movedim(-1, 1).float()
    padded = torch.nn.functional.pad(flat, (2, 2, 2, 2), mode="replicate").byte().movedim(1, -1).unflatten(0, image.shape[:-3])
    found = set()
    for n in range(40):
        where = [(i, j) for i in range(5) for j in range(5)
                 if torch.equal(padded[n, ..., i:i + 16, j:j + 16, :], moved[n])]
        assert len(where) == 1
        found.add(where[0])
    assert len(found) > 15 and torch.equal(moto.random_shift(image, 0), image)


def test_the_world_model_trains_on_shifted_sequences():
    """Grey pictures with a white edge: shifting repeats the edge, which the image term must then explain."""
    batch = batch_of(tiny(), B=40)
    batch["image"][:] = 127
    batch["image"][..., 0, :] = 255

    def image_loss(shift):
        agent = moto.make_agent(tiny(shift=shift), 2, False, "cpu")
        return agent.update(batch)["model/image"]
    assert image_loss(3) > 1.15 * image_loss(0)


def test_the_behaviour_term_forgets_and_the_model_does_not():
    """With everything forgotten the behaviour term's states know the present image alone; the model's know the past."""
    def states(forget, past):
        agent, batch = moto.MOTO(tiny(reset_prob=forget), 2, True, "cpu"), batch_of(tiny())
        batch["image"][:, :3], batch["a"][:, :3] = past, past / 255
        torch.manual_seed(0)
        _, _, feat, brief = agent.model_terms(agent.prepare_batch(batch))
        return feat, brief
    (feat, brief), (feat_2, brief_2) = states(1.0, 0), states(1.0, 200)
    assert torch.equal(brief[:, 3:], brief_2[:, 3:]) and not torch.equal(brief[:, 2], brief_2[:, 2])
    assert not torch.allclose(feat[:, 3:], feat_2[:, 3:])
    assert torch.equal(*states(0.0, 0))
    half = states(0.5, 0)[1][:, 3:] - states(0.5, 200)[1][:, 3:]
    assert 0 < (half == 0).all(-1).float().mean() < 1


def test_the_pixel_prior_says_what_to_imitate_in_states_that_are_not_offline_data():
    """Offline rows keep the recorded actions; the others get the averaged prior's, where their stack of images is whole and a_{t+1}
    leaves s_t. The prior learns from the offline rows alone, and nothing else moves it."""
    cfg = tiny(pixel_prior=True, min_std=1e-6)
    agent = moto.MOTO(cfg, 2, True, "cpu")
    for policy in (agent.prior_actor, agent.prior.actor):
        with torch.no_grad():
            policy.net[-1].bias[2:] = -1e4                           # so sure that a sample is the mean
    agent.prior.updates.fill_(1000.0)                                # the average is slow by now
    batch = batch_of(cfg, B=4, T=7) | {"is_demo": torch.tensor([True, False, True, False])[:, None].expand(4, 7).clone()}
    batch["is_first"][1, 4] = True
    batch["image"] = batch["image"] // 8 + 30 * torch.arange(7, dtype=torch.uint8)[:, None, None, None]     # brighter and brighter
    arrived, done = agent.prepare_batch(batch), batch["a"].clone()
    agent.update_prior(arrived)
    arrived |= agent.prior_targets(arrived)
    assert torch.equal(arrived["a"], done)                           # what was done stays what was done
    assert torch.equal(arrived["bc_target"][[0, 2]], batch["a"][[0, 2]]) and arrived["bc_mask"][[0, 2]].all()
    assert arrived["bc_mask"][[1, 3]].tolist() == [[0, 0, 1, 0, 1, 1], [0, 0, 1, 1, 1, 1]]
    frames = [batch["image"][3, t] for t in (2, 3, 4)]               # what b saw before it said a_5
    b = agent.prior.actor(agent.prior.model(moto.to_image(torch.cat(frames, -1))[None]))
    torch.testing.assert_close(arrived["bc_target"][3, 5], b.mode[0], atol=2e-5, rtol=0)

    def prior_after(**changed):
        agent = moto.MOTO(cfg, 2, True, "cpu")
        torch.manual_seed(3)
        agent.update_prior(agent.prepare_batch(batch | changed))
        return torch.cat([p.flatten() for name in ("prior_encoder", "prior_actor") for p in agent.modules[name].parameters()])
    other = batch["a"].clone()
    other[[1, 3]] = 0.5
    assert torch.equal(prior_after(), prior_after(a=other)) and not torch.equal(prior_after(), prior_after(a=-batch["a"]))
    before = copy.deepcopy(agent.prior.state_dict())
    with moto.frozen(agent.actor):
        loss = agent.model_terms(arrived)[0]
    loss.backward()
    assert all(p.grad is None for p in agent.prior.parameters())
    assert all(torch.equal(before[name], value) for name, value in agent.prior.state_dict().items())


def test_latent_noise_is_that_of_the_behaviour_terms_states_and_of_sampling_episodes():
    """At 0 both are the means that act; the model's own states keep the posterior's noise, and so does everything at 1."""
    image = np.random.default_rng(0).integers(0, 255, (16, 16, 3), dtype=np.uint8)

    def states(share, forget, seed):
        """What the behaviour term sees, what the model sees, and what a sampling episode sees."""
        agent = moto.MOTO(tiny(latent_std_scale=share, reset_prob=forget), 2, True, "cpu")
        torch.manual_seed(seed)
        with torch.no_grad():
            _, _, feat, brief = agent.model_terms(agent.prepare_batch(batch_of(tiny())))
        return brief, feat, agent.ema_policy.act(image, generator=torch.Generator().manual_seed(seed))[1][1], agent
    for forget in (0.0, 1.0):
        (brief, feat, z, agent), (brief_2, feat_2, z_2, _) = states(0.0, forget, 1), states(0.0, forget, 2)
        assert torch.equal(brief, brief_2) and torch.equal(z, z_2) and torch.equal(z, agent.ema_policy.act(image)[1][1])
        assert not torch.allclose(feat, feat_2)
        (brief, feat, z, _), (brief_2, feat_2, z_2, _) = states(1.0, forget, 1), states(1.0, forget, 2)
        assert not torch.allclose(brief, brief_2) and not torch.allclose(z, z_2) and not torch.allclose(feat, feat_2)


def test_the_behaviour_gradient_goes_through_the_states_that_forgot():
    """Where everything is forgotten, the recurrence's weights on h get no gradient from the behaviour term."""
    def gradient(forget):
        agent = moto.MOTO(tiny(reset_prob=forget, bc_repr_weight=1.0), 2, True, "cpu")
        batch = agent.prepare_batch(batch_of(tiny()))
        with moto.frozen(agent.actor):
            torch.manual_seed(0)
            with_term = agent.model_terms(batch)[0]
            agent.cfg = dataclasses.replace(agent.cfg, bc_repr_weight=0.0)
            torch.manual_seed(0)
            without = agent.model_terms(batch)[0]
        return torch.autograd.grad(with_term - without, agent.model.gru.weight_hh)[0].abs().max()
    assert gradient(1.0) < 1e-4 < gradient(0.0)


def baseline(variant, **changes):
    """A learner of tiny size, features, and a batch to match them, with one seam between two episodes."""
    agent, g = moto.make_agent(tiny(variant=variant, **changes), 2, True, "cpu"), torch.Generator().manual_seed(1)
    batch = agent.prepare_batch(batch_of(agent.cfg) | {"terminal": (torch.rand(4, 6, generator=g) < 0.2).float()})
    batch["valid"][1, 2] = batch["bc_mask"][1, 2] = batch["bc_mask"][2, 4] = 0
    return agent, torch.randn(4, 6, 22, generator=g), batch


def one_by_one(batch):
    """(b, t) of the transitions s_t, a_{t+1}, r_{t+1}, s_{t+1} inside an episode."""
    return [(b, t) for b in range(4) for t in range(5) if batch["valid"][b, t]]


def test_bc_against_an_oracle():
    agent, feat, batch = baseline("bc")
    loss, _ = agent.losses(feat, batch)
    terms = []
    for b, t in one_by_one(batch):
        if batch["bc_mask"][b, t]:
            policy = agent.actor(feat[b, t])
            terms.append(D.TransformedDistribution(D.Normal(policy.mean, policy.std), [D.TanhTransform()]).log_prob(batch["a"][b, t + 1]).sum())
    torch.testing.assert_close(loss, -torch.stack(terms).mean(), rtol=1e-4, atol=1e-4)


def test_expectile_loss_is_asymmetric_and_finds_the_expectile():
    x, one = torch.tensor([2.0, -1.0, 3.0]), torch.ones(3)
    torch.testing.assert_close(baselines.expectile_loss(x, 0.5, one), 0.5 * x.square().mean())
    torch.testing.assert_close(baselines.expectile_loss(x, 0.9, one),
                               (0.9 * 4 + 0.1 * 1 + 0.9 * 9) / torch.tensor(3.0))
    v = torch.zeros((), requires_grad=True)                                                # of {0, 1} at tau = 0.9: v = 0.9
    optimiser = torch.optim.SGD([v], 0.5)
    for _ in range(500):
        optimiser.zero_grad()
        baselines.expectile_loss(torch.tensor([0.0, 1.0]) - v, 0.9, torch.ones(2)).backward()
        optimiser.step()
    assert abs(float(v) - 0.9) < 1e-3


@pytest.mark.parametrize("expectile", [0.5, 0.8])
def test_iql_against_an_oracle(expectile, monkeypatch):
    assert (baselines.IQL.expectile, baselines.IQL.temperature) == (0.5, 3.0)
    monkeypatch.setattr(baselines.IQL, "expectile", expectile)
    agent, feat, batch = baseline("iql", gamma=0.9)
    unit, value, critic, actor = 10.0, [], [], []
    with torch.no_grad():
        for p in agent.target.parameters():
            p.add_(0.1 * torch.randn_like(p))
    for b, t in one_by_one(batch):
        s, a = feat[b, t], batch["a"][b, t + 1]
        q = agent.target(s[None], a[None]).min().detach()
        V, V_next = unit * agent.value(s), unit * agent.value(feat[b, t + 1])
        value.append((abs(expectile - float(q < V)) * ((q - V) / unit) ** 2).squeeze())
        y = batch["r"][b, t + 1] + 0.9 * (1 - batch["is_terminal"][b, t + 1]) * V_next.detach()
        critic.append((((agent.critic(s[None], a[None]) - y) / unit) ** 2).sum())
        actor.append(-(min(math.exp(3.0 * float(q - V)), 100) * agent.actor(s).log_prob(a)))
    expected = sum(torch.stack(terms).mean() for terms in (value, critic, actor))
    loss, metrics = agent.losses(feat, batch)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    for name in ("actor", "critic", "value"):                                              # each part learns from its own loss alone
        p = next(agent.modules[name].parameters())
        own = {"actor": actor, "critic": critic, "value": value}[name]
        torch.testing.assert_close(torch.autograd.grad(loss, p, retain_graph=True)[0],
                                   torch.autograd.grad(torch.stack(own).mean(), p, retain_graph=True)[0], rtol=1e-3, atol=1e-6)


def test_cql_integral_against_quadrature(monkeypatch):
    agent, feat, _ = baseline("cql")
    monkeypatch.setattr(agent, "critic", lambda s, a: torch.stack([2 * a.sum(-1), -a.square().sum(-1)]))
    monkeypatch.setattr(baselines.CQL, "samples", 20_000)
    torch.manual_seed(0)
    policy = agent.actor(feat[:1, :2])
    x = torch.linspace(-1, 1, 2001)
    exact = [2 * torch.trapezoid(f.exp(), x).log() for f in (2 * x, -x.square())]           # two actions: a square
    got = agent.integral(feat[:1, :2], policy)
    assert got.shape == (2, 1, 1)
    torch.testing.assert_close(got.flatten(), torch.stack(exact), rtol=0.03, atol=0.03)


@pytest.mark.parametrize("variant", ["sac", "cql"])
def test_sac_and_cql_against_an_oracle(variant, monkeypatch):
    """With the policy made deterministic its one sample is its mode, and every term can be computed by hand."""
    agent, feat, batch = baseline(variant, gamma=0.9)
    assert agent.cql_weight == {"sac": 0.0, "cql": 5.0}[variant]
    monkeypatch.setattr(torch, "randn_like", torch.zeros_like)
    integral = torch.rand(2, 4, 5)
    monkeypatch.setattr(agent, "integral", lambda *_: integral)
    with torch.no_grad():
        agent.log_tau[0].fill_(math.log(0.3))
        for p in agent.target.parameters():
            p.add_(0.1 * torch.randn_like(p, memory_format=torch.preserve_format) + 0.02)
    critic, gap, hope, logps = [], [], [], []
    mode = lambda s: (agent.actor(s).mode, agent.actor(s).log_density_at(agent.actor(s).mean))
    for b, t in one_by_one(batch):
        s, a, (a_next, logp_next) = feat[b, t][None], batch["a"][b, t + 1][None], mode(feat[b, t + 1][None])
        y = batch["r"][b, t + 1] + 0.9 * (1 - batch["is_terminal"][b, t + 1]) * (agent.target(feat[b, t + 1][None], a_next).min() - 0.3 * logp_next)
        q = agent.critic(s, a)
        critic.append((((q - y.detach()) / 10) ** 2).sum())
        gap.append((integral[:, b, t] - q.squeeze()).sum() / 100)
    for s in feat.flatten(0, 1):
        a, logp = mode(s[None])
        hope.append(agent.critic(s[None], a).min()), logps.append(logp)
    logp, log_tau = torch.cat(logps), agent.log_tau[0]
    parts = {"critic": torch.stack(critic).mean() + agent.cql_weight * torch.stack(gap).mean(),
             "actor": (0.3 * logp - torch.stack(hope)).mean() / 10, "log_tau": -log_tau * (logp.detach() - 2).mean()}
    loss, _ = agent.losses(feat, batch)
    torch.testing.assert_close(loss, sum(parts.values()), rtol=1e-4, atol=1e-4)
    for name, part in parts.items():
        p = next(agent.modules[name].parameters())
        torch.testing.assert_close(torch.autograd.grad(loss, p, retain_graph=True)[0],
                                   torch.autograd.grad(part, p, retain_graph=True)[0], rtol=1e-3, atol=1e-6)
    feat.requires_grad_()                                                                   # the actor's loss does not shape the encoder
    loss, _ = agent.losses(feat, batch)
    grad, = torch.autograd.grad(loss, feat)
    assert not grad[:, -1].any() and grad[:, :-1].any()


def test_cql_prefers_the_actions_of_the_data():
    def preference(variant):
        agent = moto.make_agent(tiny(variant=variant, shift=0, critic_lr=3e-3), 2, False, "cpu")
        batch = batch_of(agent.cfg)
        for _ in range(150):
            metrics = agent.update(batch)
        return metrics
    cautious = preference("cql")["critic/gap"]
    assert cautious < moto.make_agent(tiny(variant="cql", shift=0), 2, False, "cpu").update(batch_of(tiny()))["critic/gap"] - 1
    assert preference("sac")["critic/gap"] == 0


@pytest.mark.parametrize("variant", ["iql", "cql"])
def test_a_baseline_that_was_stopped_resumes_bit_for_bit(dots, tmp_path, monkeypatch, variant):
    learner, calls = moto.AGENTS[variant], []
    assert run(dots, tmp_path / "whole", variant=variant) == 0
    update = learner.update

    def stopping(self, batch):
        calls.append(1)
        if len(calls) == 8:                                          # inside an episode's updates
            os.kill(os.getpid(), signal.SIGTERM)
        return update(self, batch)
    with monkeypatch.context() as patch:
        patch.setattr(learner, "update", stopping)
        assert run(dots, tmp_path / "parts", variant=variant, save_every=100) == 143
    assert run(dots, tmp_path / "parts", variant=variant, save_every=100) == 0
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert len(whole) == len(parts) and all(map(same, whole, parts))


def test_the_command_of_the_baselines_with_processes_that_play(dots, tmp_path, capsys):
    """Every process knows the class: the sweep's, and those in which its run plays episodes."""
    sweep = [*sweep_flags(dots, tmp_path, workers=2, online_episodes=1), "--tasks", DOT,
             "--variants", "iql", "bc"]
    iql, bc = (tmp_path / f"gym-test_moto-test-Dot-v0-{variant}-seed0" for variant in ("iql", "bc"))
    source = HERE / "experiments/baselines.py"
    for program, argv in (("reproduce.py", sweep),
                          ("baselines.py", ["--evaluate", iql, "--episodes", 2])):
        command = [sys.executable, source.with_name(program), *map(str, argv)]
        result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True,
                                env=os.environ | {"OMP_NUM_THREADS": "1"})
        assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["variant"] == "iql"
    assert (iql / source.name).read_bytes() == source.read_bytes()     # the program of its agent
    assert (bc / "moto.py").exists() and not (bc / source.name).exists()
    assert reproduce.main(sweep) == 0
    assert "2 finished before, 0 to do" in capsys.readouterr().out


def test_moto_alone_says_where_the_baselines_are(capsys, monkeypatch, tmp_path):
    assert set(moto.BASELINES) == moto.AGENTS.keys() - {"bc"}
    for name in moto.BASELINES:
        config = {"config": dataclasses.asdict(tiny(variant=name))}
        (tmp_path / "config.json").write_text(json.dumps(config))
        monkeypatch.delitem(moto.VARIANTS, name)
        for argv in (["--variant", name], ["--evaluate", tmp_path]):
            one_sentence(capsys, argv, name, "python experiments/baselines.py")


# ------------------------------------------------------------------------------------------------------ runs and resuming

def weights(logdir):
    state = torch.load(Path(logdir) / "checkpoint.pt", weights_only=True)["agent"]
    flat = lambda s: [v for x in (s.values() if isinstance(s, dict) else s) for v in flat(x)] if isinstance(s, (dict, list)) else [s]
    return flat(state)


def same(a, b):
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


def run(dots, logdir, **changes):
    moto.stop_requested["signal"] = None
    return moto.main(flags(**(TINY | {"data": dots, "logdir": logdir} | changes)))


@pytest.fixture(scope="module")
def finished(dots, tmp_path_factory):
    logdir = tmp_path_factory.mktemp("whole")
    assert run(dots, logdir) == 0
    return logdir


@pytest.mark.parametrize("changes", [{}, {"pixel_prior": True, "latent_std_scale": 0.0}])
def test_the_newest_averaged_policy_plays_also_after_a_stop(dots, tmp_path, monkeypatch, changes):
    """Episode k is played by the weights after all updates so far; also after a stop in between."""
    true_rollout, played = moto.rollout, []

    def watched(cfg, env, policy, seed, sample):
        if seed[1] == 1:                                                          # the online stream
            played.append((seed[2], float(policy.updates)))
        return true_rollout(cfg, env, policy, seed, sample)
    monkeypatch.setattr(moto, "rollout", watched)
    assert run(dots, tmp_path / "whole", online_episodes=4, **changes) == 0
    assert played == [(0, 6.0), (1, 10.0), (2, 14.0), (3, 18.0)]                # 6 offline updates, then 4 per episode
    played.clear()
    true_update = moto.Run.update

    def stopping(self, bar, stage):
        if self.state["updates"] == 12:
            moto.stop_requested["signal"] = signal.SIGTERM
        true_update(self, bar, stage)
    monkeypatch.setattr(moto.Run, "update", stopping)
    assert run(dots, tmp_path / "halves", online_episodes=4, **changes) == 128 + signal.SIGTERM
    monkeypatch.setattr(moto.Run, "update", true_update)
    assert run(dots, tmp_path / "halves", online_episodes=4, **changes) == 0
    assert played == [(0, 6.0), (1, 10.0), (2, 14.0), (3, 18.0)]
    a, b = weights(tmp_path / "whole"), weights(tmp_path / "halves")
    assert len(a) == len(b) and all(map(same, a, b))


@pytest.mark.parametrize("stop_at", [3, 6, 8, 10])                             # offline, the boundary, inside an episode's updates, between
def test_stop_and_resume_equals_never_stopping_bit_for_bit(finished, dots, tmp_path, monkeypatch, capsys, stop_at):
    update = moto.MOTO.update
    calls = []

    def stopping(self, batch):
        calls.append(1)
        if len(calls) == stop_at:
            os.kill(os.getpid(), signal.SIGTERM if stop_at % 2 else signal.SIGINT)
        return update(self, batch)
    monkeypatch.setattr(moto.MOTO, "update", stopping)
    assert run(dots, tmp_path, save_every=100) == (143 if stop_at % 2 else 130)
    assert "repeat the command" in capsys.readouterr().err
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["state"]["updates"] == stop_at
    monkeypatch.setattr(moto.MOTO, "update", update)
    torch.manual_seed(999)
    assert run(dots, tmp_path, save_every=100) == 0
    whole, parts = weights(finished), weights(tmp_path)
    assert len(whole) == len(parts) and all(map(same, whole, parts))
    updates = [r["updates"] for r in moto.read_metrics(tmp_path / "metrics.jsonl") if "model/image" in r]
    assert updates == list(range(1, 15))


def test_a_run_of_no_updates_scores_and_draws_the_untrained_agent(dots, tmp_path):
    assert run(dots, tmp_path, offline_updates=0, online_episodes=0) == 0
    assert (tmp_path / "prediction.png").exists() and json.loads((tmp_path / "result.json").read_text())["updates"] == 0


def test_what_a_run_leaves(finished):
    names = {"config.json", "metrics.jsonl", "result.json", "moto.py", "checkpoint.pt", "curve.png", "prediction.png", "eval.gif"}
    assert names <= {p.name for p in finished.iterdir()}
    result = json.loads((finished / "result.json").read_text())
    assert {"task", "variant", "seed", "preset", "offline_success", "final_success", "eval_episodes", "updates", "env_steps",
            "wall_seconds", "device"} <= result.keys()
    assert result["updates"] == 14 and result["env_steps"] == 24 and result["wall_seconds"]["total"] > 0
    assert (finished / "moto.py").read_bytes() == (HERE / "moto.py").read_bytes()
    config = json.loads((finished / "config.json").read_text())
    assert torch.__version__.startswith(config["versions"]["torch"]) and config["config"]["horizon"] == 3
    import imageio.v3 as imageio
    assert imageio.imread(finished / "eval.gif").shape[1:] == (64, 64, 3)      # policy above reconstruction, two episodes, doubled


def test_a_longer_budget_continues_a_finished_run_and_scores_it_again(finished, dots, tmp_path, capsys):
    import shutil
    shutil.copytree(finished, tmp_path / "run")
    assert run(dots, tmp_path / "run", online_episodes=3, final_episodes=3) == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["updates"] == 18 and result["eval_episodes"] == 3
    scored = [row["updates"] for row in moto.read_metrics(tmp_path / "run" / "metrics.jsonl") if row.get("evaluation") == "final"]
    assert scored == [14, 18]
    before = (tmp_path / "run" / "config.json").read_bytes()
    assert run(dots, tmp_path / "run", online_episodes=1, final_episodes=3) == 2 and "18 updates, more than" in capsys.readouterr().err
    assert (tmp_path / "run" / "config.json").read_bytes() == before


def test_a_finished_run_repeated_changes_nothing(finished, dots):
    before = weights(finished)
    assert run(dots, finished) == 0
    assert all(map(same, before, weights(finished)))


def test_a_damaged_checkpoint_falls_back_to_the_one_before(dots, tmp_path, capsys):
    assert run(dots, tmp_path, online_episodes=0) == 0
    newest = tmp_path / "checkpoint.pt"
    newest.write_bytes(newest.read_bytes()[:1000])
    assert run(dots, tmp_path, online_episodes=0) == 0 and "damaged" in capsys.readouterr().err
    for path in (newest, tmp_path / "checkpoint.previous.pt"):
        path.write_bytes(b"nonsense")
    assert run(dots, tmp_path, online_episodes=0) == 2 and "no checkpoint" in capsys.readouterr().err


def child(code, *argv, **kwargs):
    """Run `code` in a fresh interpreter that has this moto and the toy task."""
    start = (f"import importlib.util, sys; s = importlib.util.spec_from_file_location('test_moto', {str(Path(__file__))!r}); "
             "t = importlib.util.module_from_spec(s); s.loader.exec_module(t); moto = t.moto\n")
    return subprocess.run([sys.executable, "-c", start + code, *map(str, argv)], capture_output=True, text=True, **kwargs)


def test_a_reader_never_sees_half_a_file(tmp_path):
    path, failing = tmp_path / "file", lambda file: (file.write(b"new"), 1 / 0)
    moto.write_atomically(path, lambda file: file.write(b"old"))
    with pytest.raises(ZeroDivisionError):
        moto.write_atomically(path, failing)
    assert path.read_bytes() == b"old"
    with open(path, "rb") as reader:
        moto.write_atomically(path, lambda file: file.write(b"new"))
        assert reader.read() == b"old" and path.read_bytes() == b"new"


@pytest.mark.parametrize("moment", ["half a file", "between the renames"])
def test_kill_minus_nine_during_a_save_loses_one_save_at_most(dots, tmp_path, capsys, moment):
    dying = {"half a file": "save = torch.save\n"
                            "def dying(obj, f):\n    save(obj, f)\n    if obj.get('state', {}).get('updates') == 4: f.truncate(500); os.kill(os.getpid(), 9)\n"
                            "torch.save = dying\n",
             "between the renames": "replace = os.replace\n"
                                    "def dying(a, b):\n    replace(a, b)\n    if 'previous' in str(b) and moto.seen > 3: os.kill(os.getpid(), 9)\n"
                                    "os.replace = dying\nmoto.seen = 0\nupdate = moto.MOTO.update\n"
                                    "def counted(self, b):\n    moto.seen += 1\n    return update(self, b)\nmoto.MOTO.update = counted\n"}[moment]
    result = child("import os, torch\n" + dying + "sys.exit(moto.main(sys.argv[1:]))", *flags(**(TINY | {"data": dots, "logdir": tmp_path})))
    assert result.returncode == -9
    assert moto.Run(tiny(data=str(dots), logdir=str(tmp_path))).state["updates"] == 3
    assert run(dots, tmp_path) == 0


def test_the_command_that_evaluates_and_the_one_that_shows_runs(finished, capsys):
    assert moto.main(["--evaluate", str(finished), "--episodes", "3"]) == 0
    score = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert score["episodes"] == 3 and 0 <= score["success"] <= 1 and score["updates"] == 14
    assert reproduce.main([str(finished), str(finished)]) == 0              # it counts once: one seed
    assert all((finished.parent / name).stat().st_size > 5000 for name in ("curves.png", "gap.png"))
    last = capsys.readouterr().out.splitlines()[-1].split(" | ")
    result = json.loads((finished / "result.json").read_text())
    assert last[2] == "0" and last[3] == f"{result['offline_success']:.0%}" and last[6] == f"{result['final_success']:.0%}"


@pytest.mark.parametrize("panels", [1, 2, 7])
def test_the_legend_of_all_variants_fits_beneath_the_panels(tmp_path, monkeypatch, panels):
    drawn = []
    monkeypatch.setattr(moto, "save_figure", lambda fig, path: drawn.append(fig))
    groups = {variant: [({}, {0: {}, 100: {}})] for variant in moto.VARIANTS}
    tasks = {f"task {n}": groups for n in range(panels)}
    reproduce.draw_groups(tmp_path / "curves.png", tasks, "success", lambda row: 0.5)
    drawn[0].canvas.draw()
    legend = drawn[0].legends[0].get_window_extent()
    assert len(drawn[0].legends[0].texts) == len(moto.VARIANTS) and legend.x0 >= 0 and legend.x1 <= drawn[0].bbox.width


def test_the_interval_covers_what_seeds_and_episodes_leave_open():
    row = lambda success, n: {"evaluation/success": success, "evaluation/episodes": n}
    low, high = reproduce.interval([row(0.5, 50)])
    assert 0.35 < low < 0.39 and 0.61 < high < 0.65                                         # one binomial: 0.5 +- 1.96 * 0.0707
    placed = lambda *counts: {"evaluation/success": counts[4] / 20, "evaluation/episodes": 20, "evaluation/counts": counts,
                              "evaluation/completed": np.dot(range(5), counts) / 20}       # Kitchen: episodes with 0 to 4 objects
    low, high = reproduce.interval([placed(10, 0, 0, 0, 10)])
    assert 0.27 < low < 0.33 and 0.67 < high < 0.73                                         # all or nothing: 20 draws, not 80
    assert np.diff(reproduce.interval([placed(0, 0, 20, 0, 0)])) < 0.13 and np.diff(reproduce.interval([placed(10, 0, 0, 0, 10)])) > 0.37
    wide = np.diff(reproduce.interval([row(0.1, 50), row(0.9, 50)]))
    assert wide > 0.7 > 0.2 > np.diff(reproduce.interval([row(0.5, 50), row(0.5, 50)]))            # seeds that differ widen it
    assert np.diff(reproduce.interval([row(0.5, 5000)])) < 0.03 and reproduce.interval([row(1.0, 50)])[0] > 0.93


def test_what_acts_is_enough_to_evaluate_and_not_enough_to_continue(finished, dots, tmp_path, capsys):
    """A published agent is a copy of two files: it scores as its run does, and no command changes a folder that another one made."""
    def content(folder):
        return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    small = tmp_path / "small"
    small.mkdir()
    for name in ("config.json", "agent.pt"):
        shutil.copy(finished / name, small)
    assert (small / "agent.pt").stat().st_size < 0.25 * (finished / "checkpoint.pt").stat().st_size
    scores, before = [], content(finished)
    for folder in (finished, small):
        capsys.readouterr()
        assert moto.main(["--evaluate", str(folder), "--episodes", "6"]) == 0
        scores.append(json.loads(capsys.readouterr().out.splitlines()[-1]))
    assert scores[0] == scores[1] and "value_estimate" not in scores[0] and scores[0]["episodes"] == 6
    after = content(finished)
    assert after.pop("evaluate.gif") and before.pop("evaluate.gif", True) and after == before
    config = json.loads((finished / "config.json").read_text())["config"]
    before = content(small)
    one_sentence(capsys, flags(**(config | {"logdir": small})), "cannot be continued")
    assert {**content(small), ".lock": b""} == before | {".lock": b""}
    whole, part = moto.Run(moto.Config(**config)), moto.open_run(small)
    torch.testing.assert_close(part.agent.model.disagreement_mean, whole.agent.model.disagreement_mean)
    torch.testing.assert_close(part.agent.model.state_dict(), whole.agent.ema_policy.model.state_dict(), rtol=1e-3, atol=1e-3)
    assert part.state["updates"] == 14


def test_evaluating_a_run_that_is_still_training_leaves_its_metrics_alone(finished, tmp_path, capsys):
    shutil.copytree(finished, tmp_path / "live")
    metrics = tmp_path / "live" / "metrics.jsonl"
    with open(metrics, "a") as file:
        file.write(json.dumps({"updates": 99, "model/image": 1.0}) + "\n")      # trained since the last checkpoint
    written = metrics.read_bytes()
    assert moto.main(["--evaluate", str(tmp_path / "live"), "--episodes", "1"]) == 0
    assert metrics.read_bytes() == written


# ------------------------------------------------------------------------------------------------------ the sweep

DOT = "gym:test_moto:test/Dot-v0"                                 # a name that processes which know nothing of this one can import


def sweep_flags(dots, root, **changes):
    common = {name: value for name, value in (TINY | {"data": dots, "logdir": root} | changes).items() if name != "task"}
    return reproduce.flags(common)


def finish_times(root):
    return {path.parent.name: path.stat().st_mtime_ns for path in Path(root).glob("*/result.json")}


def test_a_sweep_runs_all_reports_failures_and_skips_what_is_finished(dots, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", str(torch.get_num_threads()))   # of the sweep's processes: sums depend on it
    argv = [*sweep_flags(dots, tmp_path), "--tasks", DOT, "gym:NoSuch-v0",
            "--variants", "moto", "no-unc", "--jobs", "2"]
    assert reproduce.main(argv) == 2
    captured = capsys.readouterr()
    names = {f"gym-test_moto-test-Dot-v0-{variant}-seed0" for variant in ("moto", "no-unc")}
    assert set(finish_times(tmp_path)) == names and "4 runs" in captured.out and "2 of 4 runs failed" in captured.err
    shown = lambda out: [line.split(" | ")[:3] for line in out.splitlines() if line.startswith("| gym")]
    assert shown(captured.out) == [[f"| {DOT}", variant, "0"] for variant in ("moto", "no-unc")]
    assert all((tmp_path / name).stat().st_size > 5000 for name in ("curves.png", "gap.png"))
    failed, other = "gym-NoSuch-v0-no-unc-seed0", "gym-test_moto-test-Dot-v0-no-unc-seed0"
    assert failed in captured.err and "NoSuch" in (tmp_path / failed / "log.txt").read_text()
    alone = tmp_path / "alone" / "no-unc"              # each run is what its own command makes
    own = dict(task=DOT, data=dots, variant="no-unc", logdir=alone)
    assert moto.main(flags(**(TINY | own))) == 0
    assert all(same(a, b) for a, b in zip(weights(alone), weights(tmp_path / other)))
    before = finish_times(tmp_path)
    capsys.readouterr()
    mine = [word for word in argv if word != "gym:NoSuch-v0"]
    assert reproduce.main(mine) == 0
    assert finish_times(tmp_path) == before and "2 finished before, 0 to do" in capsys.readouterr().out
    assert not reproduce.finished(moto.build_config(**(TINY | dict(task=DOT, data=str(dots), logdir=str(tmp_path / min(names)), gamma=0.5))))
    assert reproduce.main([word for word in mine if word != "moto"] + ["--online-episodes", "3"]) == 0      # another budget: not finished
    assert {name for name in names if finish_times(tmp_path)[name] != before[name]} == {other}
    assert shown(capsys.readouterr().out) == [[f"| {DOT}", "no-unc", "0"]]      # the runs of the command alone


def test_flags_of_a_sweep_leave_a_variant_what_it_is_and_a_single_run_says_what_it_became(dots, tmp_path, capsys):
    argv = [*sweep_flags(dots, tmp_path, online_episodes=1, bc_repr_weight=3.0, alpha=0.5), "--tasks", DOT, "--variants", "no-bc", "no-unc", "bc"]
    assert reproduce.main(argv) == 0
    config = {v: json.loads((tmp_path / f"gym-test_moto-test-Dot-v0-{v}-seed0" / "config.json").read_text())["config"] for v in ("no-bc", "no-unc", "bc")}
    assert [config[v]["bc_repr_weight"] for v in config] == [0, 3, 3] and [config[v]["alpha"] for v in config] == [0.5, 0, 0.5]
    assert [config[v]["online_episodes"] for v in config] == [1, 1, 0] and config["no-bc"]["beta"] == 0
    capsys.readouterr()
    assert run(dots, tmp_path / "alone", variant="no-bc", bc_repr_weight=3.0) == 0
    assert "note: this is no-bc with bc_repr_weight 3.0 for its 0.0\n" in capsys.readouterr().out
    assert run(dots, tmp_path / "plain", variant="no-bc") == 0 and "note:" not in capsys.readouterr().out


@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="follows processes as Linux does")
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_sweep_leaves_nothing_running_and_resumes(dots, tmp_path, capsys, how):
    """Two runs, one at a time. The sweep dies in the second, whose process saves and stops; repeated, only that one is continued."""
    import select
    argv = [*sweep_flags(dots, tmp_path, offline_updates=400, save_every=20, log_every=20), "--tasks", DOT, "--seeds", "0", "1"]
    process = subprocess.Popen([sys.executable, HERE / "experiments/reproduce.py", *argv], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
                               env=os.environ | {"OMP_NUM_THREADS": "1"})
    while not process.stdout.readline().startswith("gym-test_moto-test-Dot-v0-moto-seed0: success"):
        assert process.poll() is None
    first, second = (tmp_path / f"gym-test_moto-test-Dot-v0-moto-seed{seed}" for seed in (0, 1))
    while not (second / "checkpoint.pt").exists():                   # it is under way: 20 of 408 updates are saved
        assert process.poll() is None
    children = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    handles = [os.pidfd_open(pid) for pid in children]
    process.send_signal(how)
    assert process.wait(60) == {signal.SIGKILL: -9, signal.SIGINT: 130}[how]
    for handle in handles:
        assert select.select([handle], [], [], 60)[0]                # the run's process ends by itself
    done = torch.load(second / "checkpoint.pt", weights_only=True)["state"]["updates"]
    assert 0 < done < 408 and not (second / "result.json").exists()
    before = finish_times(tmp_path)
    assert reproduce.main(argv) == 0 and "1 finished before, 1 to do" in capsys.readouterr().out
    assert f"continuing at update {done}" in (second / "log.txt").read_text()
    assert finish_times(tmp_path).keys() == {first.name, second.name} and finish_times(tmp_path)[first.name] == before[first.name]


def test_a_sweep_through_submitit(dots, tmp_path, capsys):
    pytest.importorskip("submitit")
    argv = [*sweep_flags(dots, tmp_path, online_episodes=1), "--tasks", "gym:NoSuch-v0", DOT,
            "--variants", "iql", "--jobs", "2", "--executor", "local"]
    assert reproduce.main(argv) == 2
    assert list(finish_times(tmp_path)) == ["gym-test_moto-test-Dot-v0-iql-seed0"]
    assert "NoSuch" in capsys.readouterr().err


def test_a_reader_that_stops_reading_is_no_error(tmp_path):
    """As in `python experiments/reproduce.py experiments/runs/*-seed* | head -3`."""
    name = "drawer-open-bc-seed3"
    shutil.copytree(HERE / "experiments/runs" / name, tmp_path / name)
    process = subprocess.Popen([sys.executable, HERE / "experiments/reproduce.py", tmp_path / name], stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONUNBUFFERED": ""})
    process.stdout.close()                                           # before it has written anything
    errors = process.stderr.read()
    assert process.wait() == 0 and "Error" not in errors


def test_two_processes_do_not_train_in_one_folder(dots, tmp_path, capsys):
    fcntl = pytest.importorskip("fcntl")
    with open(tmp_path / ".lock", "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        half = {tmp_path / name: name.encode() for name in ("checkpoint.new.pt", "checkpoint.new.pt.7.partial")}
        for path, content in half.items():                           # what the first one is about to finish
            path.write_bytes(content)
        assert run(dots, tmp_path) == 2 and "another process is training" in capsys.readouterr().err
        assert all(path.read_bytes() == content for path, content in half.items())
    assert run(dots, tmp_path) == 0 and not list(tmp_path.glob("*.partial"))


# ------------------------------------------------------------------------------------------------------ errors

def test_importing_moto_has_no_side_effects_and_needs_no_simulator(tmp_path):
    code = ("import sys\nfor name in ('mujoco', 'metaworld', 'gymnasium', 'imageio', 'matplotlib'): sys.modules[name] = None\n"
            f"import importlib.util as u; s = u.spec_from_file_location('moto', {str(HERE / 'moto.py')!r}); m = u.module_from_spec(s); "
            "sys.modules['moto'] = m; s.loader.exec_module(m)\nm.MOTO(m.build_config(preset='debug', device='cpu'), 4, False, 'cpu')")
    env = {k: v for k, v in os.environ.items() if k != "MUJOCO_GL"}
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert result.returncode == 0 and result.stdout == "" and not list(tmp_path.iterdir()), result.stderr


def one_sentence(capsys, argv, *words, program=moto):
    moto.stop_requested["signal"] = None
    assert program.main([str(a) for a in argv]) == 2
    err = capsys.readouterr().err
    message = [line for line in re.split(r"[\r\n]", err) if line.startswith("moto: ")]
    assert len(message) == 1 and "Traceback" not in err
    assert all(word in message[0] for word in words), message


@pytest.mark.parametrize("argv,words", [
    (["--task", "drawer-opne"], ["drawer-open", "did you mean"]),
    (["--task", "gym:Nothing-v0"], ["Nothing-v0"]),
    (["--task", "gym:CartPole-v1"], ["CartPole-v1"]),
    (["--variant", "no-uncertainty"], ["no-unc"]),
    (["--preset", "huge"], ["laptop"]),
    (["--batch", "0"], ["--batch", "[1, inf)"]),
    (["--gamma", "1.5"], ["--gamma", "[0, 1)"]),
    (["--gamma", "1"], ["--gamma", "[0, 1)"]),
    (["--alpha", "nan"], ["--alpha", "[0, inf)"]),
    (["--model-lr", "0"], ["--model-lr", "(0, inf)"]),
    (["--image-size", "50"], ["multiple of 16"]),
    (["--length", "1"], ["--length", "[4, inf)"]),
    (["--episode-steps", "300"], ["--episode-steps", "at most 245"]),
    (["--evaluate", "/nowhere", "--episodes", "0"], ["--episodes", "at least 1"]),
    (["--device", "abacus"], ["abacus"]),
    (["--precision", "int8"], ["--precision"]),
    (["--data", "/nowhere/at/all"], ["no folder"]),
    (["--evaluate", "/nowhere"], ["run folder"]),
    (["--logdir", "/proc/none/x"], ["cannot write"]),
])
def test_bad_input_gets_one_sentence(capsys, tmp_path, argv, words):
    defaults = {"--logdir": tmp_path / "run", "--cache": tmp_path / "demos", "--preset": "debug", "--device": "cpu"}
    training = argv[0] != "--evaluate"
    one_sentence(capsys, argv + [w for k, v in defaults.items() if k not in argv and training for w in (k, v)], *words)


@pytest.mark.parametrize("argv, words", [
    (["--variant", "bc"], "parts of MOTO"), (["--variant", "iql"], "parts of MOTO"),
    (["--gamma", "2"], "--gamma"), (["--evaluate", "x"], "--evaluate is for moto.py")])
def test_the_bench_with_bad_arguments_says_so(capsys, argv, words):
    assert bench.main(argv) == 2
    error = capsys.readouterr().err
    assert words in error and "Traceback" not in error


@pytest.mark.parametrize("argv, words", [
    ([], ["--tasks", "run folders"]),
    (["/nowhere"], ["/nowhere is no run folder"]),
    (["--variants", "moto", "icl"], ["did you mean iql"]),
    (["--tasks", "hammer", "--gamma", "2"], ["--gamma", "[0, 1)"]),
    (["--jobs", "0"], ["--jobs at least 1"]),
    (["--executor", "pbs"], ["process, slurm, local"]),
    (["--seed", "1", "--seeds", "2"], ["--seed", "--seeds"]),
    (["RUN", "--alpha", "2", "--jobs", "3"], ["--alpha", "--jobs", "run folders"]),
])
def test_bad_arguments_of_many_runs_are_refused_before_anything_starts(
        finished, capsys, tmp_path, monkeypatch, argv, words):
    monkeypatch.chdir(tmp_path)
    argv = [str(finished) if word == "RUN" else word for word in argv]
    one_sentence(capsys, argv, *words, program=reproduce)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("short, chosen", [(1.0, "bfloat16"), (1.9, "float32"), (4.0, "float32")])
def test_precision_auto_takes_bfloat16_only_where_it_is_clearly_faster(monkeypatch, short, chosen):
    """A product in float32 takes 2 units of time here. (An x86 processor may list bfloat16 and be
    slower with it.)"""
    clock = itertools.accumulate(itertools.cycle([0, short, 0, 2.0]))
    monkeypatch.setattr(moto.time, "perf_counter", lambda: next(clock))
    moto.bfloat16_pays.cache_clear()
    assert moto.build_config(device="cpu").precision == chosen
    moto.bfloat16_pays.cache_clear()


def test_an_unknown_flag_exits_with_two():
    with pytest.raises(SystemExit) as stop:
        moto.main(["--horizn", "3"])
    assert stop.value.code == 2


GOOD = dict(image=np.zeros((6, 16, 16, 3), np.uint8), action=np.zeros((5, 2), np.float32), reward=np.zeros(5, np.float32))


@pytest.mark.parametrize("change,word", [
    (dict(image=GOOD["image"].astype(np.float32)), "uint8"), (dict(image=GOOD["image"][:5]), "one more"),
    (dict(image=GOOD["image"][:, :8]), "shape"), (dict(action=np.zeros((5, 3), np.float32)), "(5, 2)"),
    (dict(action=np.zeros((4, 2), np.float32)), "shape"), (dict(action=np.full((5, 2), np.nan, np.float32)), "finite"),
    (dict(action=np.full((5, 2), 3, np.float32)), "[-1, 1]"), (dict(reward=np.full(5, np.inf, np.float32)), "finite"),
    (dict(reward=np.zeros(0, np.float32)), "at least one step"), (dict(action=np.array([{}] * 5)), "cannot be read"),
    (dict(reward=None), "lacks reward"), (dict(action=np.zeros((5, 2), np.int64)), "floating point"),
    (dict(terminal=np.zeros(3, bool)), "one bool"),
])
def test_a_bad_episode_is_named(capsys, dots, tmp_path, change, word):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "000.npz").write_bytes((Path(dots) / "000.npz").read_bytes())
    np.savez(tmp_path / "data" / "bad.npz", **{k: v for k, v in (GOOD | change).items() if v is not None})
    one_sentence(capsys, flags(**(TINY | {"data": tmp_path / "data", "logdir": tmp_path / "run"})), "bad.npz", word)


@pytest.mark.parametrize("damage", [lambda b: b[:len(b) // 2], lambda b: b"", lambda b: b[:300] + bytes(200) + b[500:]])
def test_a_truncated_episode_is_named(capsys, dots, tmp_path, damage):
    (tmp_path / "bad.npz").write_bytes(damage((Path(dots) / "000.npz").read_bytes()))
    one_sentence(capsys, flags(**(TINY | {"data": tmp_path, "logdir": tmp_path / "run"})), "bad.npz", "cannot be read")


def test_too_little_data_and_wrong_rewards(capsys, dots, tmp_path):
    one_sentence(capsys, flags(**(TINY | {"data": dots, "logdir": tmp_path, "length": 500})), "--length")
    np.savez(tmp_path / "half.npz", **(GOOD | {"reward": np.full(5, 0.5)}))
    one_sentence(capsys, flags(**(TINY | {"data": tmp_path, "logdir": tmp_path / "r", "reward_head": "bernoulli"})), "--reward-head normal")


def test_a_run_of_another_config_is_named_field_by_field(capsys, finished, dots):
    one_sentence(capsys, flags(**(TINY | {"data": dots, "logdir": finished, "horizon": 2, "gamma": 0.5})), "horizon", "gamma", "3", "0.98")


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_checkpoint(capsys, dots, tmp_path):
    assert run(dots, tmp_path, online_episodes=0, offline_updates=6) == 0
    good = (tmp_path / "checkpoint.pt").read_bytes()
    agent = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    agent["agent"]["modules"]["model"]["reward.0.weight"][:] = math.nan
    agent["state"]["updates"] = 3
    torch.save(agent, tmp_path / "checkpoint.pt")
    poisoned = (tmp_path / "checkpoint.pt").read_bytes()
    one_sentence(capsys, flags(**(TINY | {"data": dots, "logdir": tmp_path, "online_episodes": 0})), "model loss", "nan", "--model-lr", "at update 4")
    assert (tmp_path / "checkpoint.pt").read_bytes() == poisoned and len(good) > 0


def test_a_full_disk_is_one_sentence_and_loses_nothing(dots, tmp_path):
    limited = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)); sys.exit(moto.main(sys.argv[1:]))"
    argv = flags(**(TINY | {"data": dots, "logdir": tmp_path}))
    assert run(dots, tmp_path, online_episodes=0) == 0
    before = (tmp_path / "checkpoint.pt").read_bytes()
    result = child(limited, *argv)
    assert result.returncode == 2 and "disk space" in result.stderr and "Traceback" not in result.stderr, result.stderr
    assert (tmp_path / "checkpoint.pt").read_bytes() == before and not list(tmp_path.glob("*.partial"))


def test_a_checkpoint_that_would_run_code_does_not(capsys, dots, tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "owned"),)
    torch.save({"config": Evil()}, tmp_path / "checkpoint.pt")
    assert run(dots, tmp_path) == 2 and not (tmp_path / "owned").exists()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the choice of MUJOCO_GL is Linux's")
def test_without_a_gl_backend_the_message_names_the_package(tmp_path):
    env = os.environ | {"MUJOCO_GL": "egl", "LIBGL_DRIVERS_PATH": "/none", "__EGL_VENDOR_LIBRARY_DIRS": "/none"}
    result = child("sys.exit(moto.main(sys.argv[1:]))", "--preset", "debug", "--logdir", tmp_path, env=env)
    assert result.returncode == 2 and "apt-get install" in result.stderr and "Traceback" not in result.stderr, result.stderr


# ------------------------------------------------------------------------------------------------------ odd environments


class Odd:
    """Gymnasium environments that are the toy's, each odd in one way: `registered(name=value, ...)` makes one, whose attributes and methods these are."""
    count = itertools.count()

    @staticmethod
    def registered(**changes):
        import gymnasium
        toy = type(gymnasium.make("test/Dot-v0").unwrapped)
        kind = type("Environment", (toy,), changes)
        name = f"test/Odd{next(Odd.count)}-v0"
        gymnasium.register(name, lambda render_mode=None: kind(render_mode))
        return f"gym:{name}"

    @staticmethod
    def from_step(number, change):
        """A step method whose answer is changed from that step of an episode on."""
        def step(self, action):
            self.count = getattr(self, "count", 0) + 1
            answer = list(super(type(self), self).step(action))
            return change(answer) if self.count >= number else tuple(answer)

        def reset(self, **kwargs):
            self.count = 0
            return super(type(self), self).reset(**kwargs)
        return {"step": step, "reset": reset}

    @staticmethod
    def picture(change):
        return {"render": lambda self: change(super(type(self), self).render(), getattr(self, "count", 0))}


PICTURE = np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8)
GRAY = np.repeat(PICTURE[..., :1], 3, -1)


@pytest.mark.parametrize("given, expected", [
    (PICTURE, PICTURE), (PICTURE[::-1, ::-1], PICTURE[::-1, ::-1]), ([PICTURE], PICTURE), (PICTURE[..., 0], GRAY), (PICTURE[..., :1], GRAY),
    (PICTURE / 255, PICTURE), ((PICTURE / 255).astype(np.float32), PICTURE), (np.moveaxis(PICTURE, -1, 0), PICTURE),
    (np.moveaxis(PICTURE[..., :1], -1, 0), GRAY), (np.concatenate([PICTURE, np.full((6, 8, 1), 255, np.uint8)], -1), PICTURE),
    (PICTURE[..., 0] > 127, np.where(GRAY > 127, 255, 0)),
    (None, "NoneType"), ([], "list"), ([PICTURE, PICTURE], "list"), (PICTURE * 2.0, "from 0 to 1"), (PICTURE.astype(np.int64), "int64"),
    (np.full((6, 8, 3), np.nan), "from 0 to 1"), (PICTURE[..., :2], r"\(6, 8, 2\)"), (PICTURE[None], r"\(1, 6, 8, 3\)"), (PICTURE[:3], r"\(3, 8, 3\)"),
    (np.zeros((0, 0, 3), np.uint8), r"\(0, 0, 3\)"), (np.concatenate([PICTURE, PICTURE[..., :1]], -1), "transparent")])
def test_pictures_are_converted_where_that_is_unambiguous_and_refused_elsewhere(given, expected):
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=expected):
            gym_task.to_rgb(given)
    else:
        image = gym_task.to_rgb(given)
        assert image.dtype == np.uint8 and image.flags.c_contiguous
        np.testing.assert_array_equal(image, expected)


@pytest.mark.parametrize("low, high, dtype", [(0, 2, np.int64), (-128, 127, np.int8), (0, 255, np.uint8), (0, 10, np.int32), (-2 ** 53, 2 ** 53, np.int64),
                                              (-0.1, 5.0, np.float64), (-0.1, 0.7, np.float16), (-3e38, 3e38, np.float32), (-1.7e308, 1.7e308, np.float64)])
def test_actions_are_mapped_evenly_onto_any_bounded_box(low, high, dtype):
    import gymnasium
    env = moto.make_env(tiny(task=Odd.registered(action_space=gymnasium.spaces.Box(low, high, (1,), dtype),
                                                 step=lambda self, action: (self.p, 0.0, False, False, {}))))
    actions = np.linspace(-1, 1, 3001)
    boxed = np.stack([env.to_box([a]) for a in actions])
    assert all(env.space.contains(value) for value in boxed) and (np.diff(boxed[:, 0].astype(float)) >= 0).all()
    assert boxed[0] == env.space.low and boxed[-1] == env.space.high
    if high - low < 11:
        shares = np.unique(boxed, return_counts=True)[1]
        assert dtype not in (np.int64, np.int32) or len(shares) == high - low + 1 and np.ptp(shares) <= 2


@pytest.mark.parametrize("changes, words", [
    (dict(render=lambda self: None), ["render() gave NoneType", "step 0"]),
    (dict(render=lambda self: 1 / 0), ["render", "ZeroDivisionError"]),
    (dict(step=lambda self, action: (self.p, 0.0, False, {})), ["step", "terminated, truncated"]),
    (dict(reset=lambda self: self.p), ["reset", "seed"]),
    (dict(reset=lambda self, seed=None, options=None: (setattr(self, "p", np.zeros(2)), self.p)[1]), ["reset", "observation, info"]),
    (Odd.from_step(1, lambda answer: (*answer[:4], {"success": {"left": True}})), ["success", "left", "step 1"]),
    (Odd.from_step(1, lambda answer: (*answer[:4], {"success": "yes"})), ["success", "yes", "step 1"]),
    (Odd.from_step(1, lambda answer: (*answer[:4], {"is_success": None})), ["is_success", "None", "step 1"]),
    (Odd.from_step(1, lambda answer: (answer[0], None, *answer[2:])), ["reward", "None", "step 1"]),
    (Odd.from_step(1, lambda answer: (answer[0], [1.0, 2.0], *answer[2:])), ["reward", "[1.0, 2.0]", "step 1"]),
    (Odd.from_step(1, lambda answer: (*answer[:2], None, *answer[3:])), ["terminated", "None"]),
    (dict(__init__=lambda self, render_mode=None: 1 / 0), ["division by zero"]),
])
def test_an_environment_that_cannot_work_is_refused_when_it_is_made(tmp_path, capsys, changes, words):
    name = Odd.registered(**changes)
    one_sentence(capsys, flags(**(TINY | {"task": name, "data": tmp_path, "logdir": tmp_path / "run"})), name.removeprefix("gym:"), *words)


def test_a_name_that_exists_is_not_proposed_and_one_that_does_not_is(capsys, tmp_path):
    name = Odd.registered(__init__=lambda self, render_mode=None: 1 / 0)
    for task, said in ((name, False), ("gym:test/Dott-v0", True)):
        one_sentence(capsys, ["--task", task, "--logdir", str(tmp_path), "--device", "cpu"], *["gym:MODULE:ID", "did you mean"] * said)
        capsys.readouterr()
        moto.main(["--task", task, "--logdir", str(tmp_path), "--device", "cpu"])
        assert ("did you mean" in capsys.readouterr().err) == said


@pytest.mark.parametrize("value, success", [(True, True), (np.bool_(False), False), (1, True), (0.0, False), (np.array([1.0]), True), (np.array([False]), False)])
def test_success_is_a_boolean_a_number_or_an_array_of_one(value, success):
    env = moto.make_env(tiny(task=Odd.registered(**Odd.from_step(1, lambda answer: (*answer[:4], {"success": value})))))
    env.reset([0])
    assert env.step(np.zeros(2))[-1] is success


@pytest.mark.parametrize("changes, words", [
    (Odd.from_step(4, lambda answer: (answer[0], float("nan"), *answer[2:])), ["reward", "nan", "step 4"]),
    (Odd.from_step(4, lambda answer: (*answer[:4], {"success": "no"})), ["success", "no", "step 4"]),
    (Odd.from_step(4, lambda answer: 1 / 0), ["ZeroDivisionError", "step 4"]),
    (Odd.from_step(99, None) | Odd.picture(lambda image, step: None if step > 3 else image), ["render() gave NoneType", "step 4"]),
    (Odd.from_step(99, None) | Odd.picture(lambda image, step: image[:8] if step > 3 else image), ["(8, 16, 3)", "(16, 16, 3)", "step 4"]),
])
def test_a_fault_in_the_middle_of_a_run_is_named_and_what_was_learned_is_saved(dots, tmp_path, capsys, changes, words):
    """Offline there is no episode; the evaluation after it is the first to meet the fault."""
    name = Odd.registered(**changes)
    one_sentence(capsys, flags(**(TINY | {"task": name, "data": dots, "logdir": tmp_path, "save_every": 100})), name.removeprefix("gym:"), *words)
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["state"]["updates"] == 6


# ------------------------------------------------------------------------------------------------------ odd machines, folders and habits


@pytest.mark.parametrize("broken", [False, True])
def test_nothing_decorative_fails_a_run(dots, tmp_path, broken):
    """Not a machine without the resource module and a display; nor a broken matplotlib."""
    code = ("import os\nsys.modules['resource'] = None\nos.environ.pop('DISPLAY', None)\nsys.path.insert(0, sys.argv[1])\n"
            f"os.environ['MPLBACKEND'] = '{'no such backend' if broken else 'tkagg'}'\n"
            "sys.exit(moto.main(sys.argv[2:]) or t.reproduce.main([sys.argv[1] + '/run']))")
    done = child(code, tmp_path, *flags(**(TINY | {"data": dots, "logdir": tmp_path / "run"})))
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    left = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"result.json", "eval.gif", "agent.pt"} <= left and (not {"curve.png", "prediction.png"} & left if broken else {"curve.png", "prediction.png"} <= left)
    assert ("note: no curve.png" in done.stderr) == ("note: no curves.png" in done.stderr) == broken and "| moto | 0 |" in done.stdout
    assert json.loads((tmp_path / "run" / "result.json").read_text())["peak_memory_gb"] is None


def test_the_result_is_there_before_any_picture(dots, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(moto, "draw_curve", lambda *args: (_ for _ in ()).throw(moto.Stopped))
    assert run(dots, tmp_path) in (130, 143) and (tmp_path / "result.json").exists()


def test_runs_are_grouped_by_configuration_and_those_without_a_score_left_out(finished, tmp_path, capsys):
    def variation(name, **changes):
        shutil.copytree(finished, tmp_path / name)
        path = tmp_path / name / "config.json"
        content = json.loads(path.read_text())
        content["config"].update(changes)
        path.write_text(json.dumps(content))
        return str(tmp_path / name)
    folders = [variation("a"), variation("b", seed=1, logdir="elsewhere", workers=2), variation("c", seed=2, beta=0.03),
               variation("d", variant="bc"), variation("begun")]
    (tmp_path / "begun" / "metrics.jsonl").write_text("")
    assert reproduce.main([*folders, folders[0] + "/../a"]) == 0
    out, err = capsys.readouterr()
    rows = [line.split(" | ")[1:3] for line in out.splitlines() if line.startswith("| gym")]
    assert rows == [["moto, beta 1.0", "0, 1"], ["moto, beta 0.03", "2"], ["bc", "0"]]
    assert "nan" not in out and f"left out, without a score yet: {tmp_path / 'begun'}" in err
    one_sentence(capsys, [folders[-1]], "no score yet", "begun", program=reproduce)


@pytest.mark.parametrize("argv, words", [
    (["--evaluate", "RUN", "--seed", "7"], ["--seed", "--evaluate", "only by training"]),
    (["--evaluate", "RUN", "--no-pixel-prior"], ["--pixel-prior", "--evaluate", "only by training"]),
    (["--episodes", "3", "--preset", "debug"], ["--episodes", "training", "only by --evaluate"]),
])
def test_a_flag_that_a_command_does_not_use_is_refused(finished, capsys, argv, words):
    one_sentence(capsys, [str(finished) if word == "RUN" else word for word in argv], *words)


def test_a_sweep_with_a_seed_twice_runs_it_once(dots, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    argv = [*sweep_flags(dots, "~/runs", offline_updates=1, online_episodes=0), "--tasks", DOT, DOT, "--variants", "bc", "bc", "--seeds", "1", "1"]
    assert reproduce.main(argv) == 0 and "1 runs" in capsys.readouterr().out
    assert [path.parent.parent.name for path in tmp_path.rglob("result.json")] == ["runs"]


def test_a_run_is_not_continued_with_other_data_or_by_another_version(dots, tmp_path, capsys):
    assert run(dots, tmp_path / "run", online_episodes=0) == 0
    same_data = shutil.copytree(dots, tmp_path / "same")
    assert run(same_data, tmp_path / "run", online_episodes=0) == 0              # another folder, the same content
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir() if path.is_file()}
    other = dot_episodes(tmp_path / "other", 6, seed=1)
    arguments = lambda data: flags(**(TINY | {"data": data, "logdir": tmp_path / "run", "online_episodes": 1}))
    one_sentence(capsys, arguments(other), "not what", "began with", "--data")
    assert {name: (tmp_path / "run" / name).read_bytes() for name in before} == before
    for path in (tmp_path / "run" / "checkpoint.pt", tmp_path / "run" / "config.json"):
        old = torch.load(path, weights_only=True) if path.suffix == ".pt" else json.loads(path.read_text())
        del old["config"]["context"]                                             # before there was such a field
        torch.save(old, path) if path.suffix == ".pt" else path.write_text(json.dumps(old))
    one_sentence(capsys, arguments(dots), "context (nothing there, 0 now)")
    one_sentence(capsys, ["--evaluate", str(tmp_path / "run")], "another version", "context")


def test_a_run_that_died_before_its_first_checkpoint_begins_again_and_one_that_lost_it_does_not(dots, tmp_path, capsys):
    assert run(dots, tmp_path, online_episodes=0) == 0
    rows = len(moto.read_metrics(tmp_path / "metrics.jsonl"))
    for path in tmp_path.glob("checkpoint*.pt"):
        path.unlink()
    one_sentence(capsys, flags(**(TINY | {"data": dots, "logdir": tmp_path, "online_episodes": 0})), "without its checkpoint")
    assert len(moto.read_metrics(tmp_path / "metrics.jsonl")) == rows
    (tmp_path / "agent.pt").unlink(), (tmp_path / "result.json").unlink()        # as published runs are: config and metrics alone
    one_sentence(capsys, flags(**(TINY | {"data": dots, "logdir": tmp_path, "online_episodes": 0})), "without its checkpoint")
    early = [row for row in moto.read_metrics(tmp_path / "metrics.jsonl") if "evaluation" not in row]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in early))
    assert run(dots, tmp_path, online_episodes=0) == 0 and len(moto.read_metrics(tmp_path / "metrics.jsonl")) == rows


def test_what_is_logged_between_two_updates_is_there_once_after_a_kill(finished, dots, tmp_path):
    """The checkpoint of update 10 is older than the episode that is played then; a kill comes between the two."""
    shutil.copytree(finished, tmp_path / "run")
    rows = moto.read_metrics(tmp_path / "run" / "metrics.jsonl")
    loads = moto.Run(tiny(data=str(dots), logdir=str(tmp_path / "run")))
    loads.state |= {"updates": 10, "episodes": 1, "scores": {"offline": {}}}
    loads.forget_later_metrics()
    left = moto.read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [row["episode"] for row in rows if "episode" in row] == [0, 1] and [row["episode"] for row in left if "episode" in row] == [0]
    assert [row["evaluation"] for row in left if "evaluation" in row] == ["offline"] and max(row["updates"] for row in left) == 10
    loads.close()


def test_a_replay_that_has_no_room_is_refused_before_demonstrations_are_made(capsys, tmp_path):
    one_sentence(capsys, flags(task="drawer-open", preset="debug", device="cpu", online_episodes=10 ** 8, cache=tmp_path / "demos", logdir=tmp_path / "run"),
                 "GB", "--online-episodes")
    assert not (tmp_path / "demos").exists()


@pytest.mark.parametrize("argv, words", [(["--device", "mps"], ["mps", "cpu, cuda"]), (["--device", "meta"], ["meta"]), (["--device", "cuda:x"], ["cuda:x"]),
                                         (["--device", "cuda:9"], ["cuda:9", "--device cpu"]), (["--seed", str(2 ** 32)], ["--seed", "4294967296)"]),
                                         (["--seed", "-1"], ["--seed", "[0, "])])
def test_devices_and_seeds_that_cannot_work_are_named(capsys, tmp_path, argv, words):
    one_sentence(capsys, ["--logdir", tmp_path, "--preset", "debug", *argv], *words)


def test_home_in_paths_odd_terminals_and_threads(dots, tmp_path, monkeypatch):
    """One run: its paths begin with ~, its folder's name is nothing a terminal in ASCII can show, and main is called in a thread."""
    shutil.copytree(dots, tmp_path / "data")
    code = ("import threading\ncodes = []\nthread = threading.Thread(target=lambda: codes.append(moto.main(sys.argv[1:])))\n"
            "thread.start(); thread.join(); sys.exit(codes[0])")
    done = child(code, *flags(**(TINY | {"data": "~/data", "logdir": "~/läuft", "cache": "~/demos", "offline_updates": 2, "online_episodes": 0})),
                 env=os.environ | {"HOME": str(tmp_path), "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}, cwd=tmp_path)
    assert done.returncode == 0 and "l\\xe4uft" in done.stdout, done.stderr
    assert (tmp_path / "läuft" / "result.json").exists() and not (tmp_path / "~").exists()


def test_a_script_without_a_main_guard_is_told_before_anything_is_trained(dots, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(f"import sys\nsys.path.insert(0, {str(HERE)!r})\nimport test_moto\nsys.exit(test_moto.moto.main(sys.argv[1:]))\n")
    argv = flags(**(TINY | {"task": DOT, "data": dots, "logdir": tmp_path / "run", "workers": 2}))
    done = subprocess.run([sys.executable, script, *argv], capture_output=True, text=True)
    assert done.returncode == 2 and "__main__" in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_compiler_that_cannot_compile_leaves_the_eager_form(tmp_path):
    code = ("import torch\n"
            f"t = moto.MOTO(moto.Config(**{dataclasses.asdict(tiny())!r}), 2, True, 'cpu', compiled=True)\n"
            "import test_moto\nprint(t.update(test_moto.batch_of(t.cfg, T=2))['model/kl'])")
    broken = {"CXX": "/bin/false", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = child(code, env=os.environ | broken)
    assert done.returncode == 0 and math.isfinite(float(done.stdout)), done.stderr


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the choice of MUJOCO_GL is Linux's")
@pytest.mark.parametrize("name, value", [("MUJOCO_GL", "nonsense"), ("PYOPENGL_PLATFORM", "glx"), ("MUJOCO_GL", "disabled")])
def test_a_users_gl_setting_that_does_not_work_is_named_as_the_cause(tmp_path, name, value):
    env = {k: v for k, v in os.environ.items() if k not in ("MUJOCO_GL", "PYOPENGL_PLATFORM", "DISPLAY")} | {name: value}
    done = child("sys.exit(moto.main(sys.argv[1:]))", "--preset", "debug", "--device", "cpu", "--logdir", tmp_path, env=env)
    assert done.returncode == 2 and f"{name}={value}" in done.stderr and "unset it" in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_frozen_leaves_what_was_frozen_before(agent):
    mine = agent.model.decoder.inp
    mine.requires_grad_(False)
    with moto.frozen(agent.model):
        assert not any(p.requires_grad for p in agent.model.parameters())
    assert not any(p.requires_grad for p in mine.parameters()) and agent.model.encoder.out.weight.requires_grad
    before = mine.weight.clone()
    agent.update(batch_of(agent.cfg))
    assert torch.equal(before, mine.weight)


def test_the_critics_promise_is_for_the_latents_that_they_were_trained_on():
    cfg = tiny()
    agent, image = moto.MOTO(cfg, 2, True, "cpu"), batch_of(cfg)["image"][0, 0].numpy()
    with torch.no_grad():
        for parameter in agent.ema_policy.model.parameters():
            parameter.add_(torch.randn_like(parameter))                          # the averaged weights are others
    a = torch.as_tensor(agent.ema_policy.act(image)[0])[None]
    x, first = moto.to_image(torch.as_tensor(image))[None, None], torch.ones(1, 1, dtype=torch.bool)
    with torch.no_grad():
        h, z, *_ = agent.model.filter(agent.model.embed(x), torch.zeros(1, 1, 2), first, scale=0.0)
        q = agent.target(torch.cat([h, z], -1)[0], a).min() * (1 - cfg.gamma)
    assert agent.value_estimate(image) == pytest.approx(float(q), abs=1e-5)


def test_players_get_what_acts_alone_and_do_not_probe_opengl_again(drawer, monkeypatch):
    sent, policy = [], moto.MOTO(tiny(), 2, True, "cpu").ema_policy
    workers = moto.RolloutWorkers(tiny(), drawer)
    workers.each = lambda function, items: sent.extend(weights for weights, *_ in items)
    workers.pool = True
    workers.play(policy, [[0, 1, 0]], sample=True)
    assert not any("decoder" in name or "priors" in name for name in sent[0]) and "actor.net.0.weight" in sent[0]
    other = moto.MOTO(tiny(seed=1), 2, True, "cpu").ema_policy
    image = batch_of(tiny())["image"][0, 0].numpy()
    other.load_state_dict(other.state_dict() | {name: torch.from_numpy(value) for name, value in sent[0].items()})
    np.testing.assert_array_equal(other.act(image)[0], policy.act(image)[0])
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: (_ for _ in ()).throw(AssertionError("an interpreter was started")))
    monkeypatch.delitem(sys.modules, "mujoco", raising=False)
    monkeypatch.setitem(moto.worker, "cfg", tiny())
    assert moto.choose_gl() == ""


def test_a_stop_between_two_lines_of_metrics_loses_none_of_their_means(dots, tmp_path, monkeypatch):
    update, calls, rows = moto.MOTO.update, [], []

    def stopping(self, batch):
        calls.append(1)
        if len(calls) == 4:
            moto.stop_requested["signal"] = signal.SIGTERM
        return update(self, batch)
    for name, patched in (("whole", update), ("parts", stopping)):
        monkeypatch.setattr(moto.MOTO, "update", patched)
        code = run(dots, tmp_path / name, log_every=3, online_episodes=0)
        assert code == (0 if name == "whole" else 143) and (code == 0 or run(dots, tmp_path / name, log_every=3, online_episodes=0) == 0)
        rows.append([{k: v for k, v in row.items() if k != "seconds"} for row in moto.read_metrics(tmp_path / name / "metrics.jsonl")])
    assert rows[0] == rows[1] and len(rows[0]) == 3                              # two of updates, and the score after them


# ------------------------------------------------------------------------------------------------------ the real simulator

@pytest.fixture(scope="module")
def drawer():
    env = moto.make_env(moto.build_config(task="drawer-open", device="cpu"))
    yield env
    env.close()


def test_metaworld_episodes_depend_on_their_seed_alone(drawer):
    def play(seed):
        frames = [drawer.reset([0, 0, seed])]
        for _ in range(8):
            frames.append(drawer.step(drawer.scripted_action())[0])
        return np.stack(frames), drawer.env._target_pos.copy()
    a, goal_a = play(1)
    b, goal_b = play(2)
    c, goal_c = play(1)
    assert np.array_equal(a, c) and np.array_equal(goal_a, goal_c) and not np.array_equal(goal_a, goal_b)
    assert a.shape == (9, 64, 64, 3) and a.dtype == np.uint8 and a.std() > 20
    red = (a[0].astype(int)[..., 0] - a[0].astype(int)[..., 1:].max(-1)) > 60   # the arm enters from above: not rolled by 180 degrees
    assert red[:32].sum() > red[32:].sum() > -1


def test_metaworld_protocol(drawer):
    drawer.reset([0, 0, 5])
    assert drawer.env.curr_path_length == 10
    image, reward, terminal, over, success = drawer.step(np.zeros(4))
    assert drawer.env.curr_path_length == 12 and (reward, terminal, over, success) == (0.0, False, False, False)


def test_players_in_processes_play_what_one_process_plays(tmp_path):
    """Two processes: metrics, episodes and weights are equal to those of one."""
    finals = []
    for workers in (1, 2):
        logdir = tmp_path / str(workers)
        done = child("import moto, sys; sys.exit(moto.main(sys.argv[1:]))", *flags(
            task="drawer-open", preset="debug", precision="float32", device="cpu", workers=workers, episode_steps=50, final_episodes=3,
            offline_updates=5, online_episodes=3, updates_per_episode=3, eval_every=5, demos=1, cache=tmp_path / "demos", logdir=logdir))
        assert done.returncode == 0, done.stderr
        with np.load(logdir / "episodes" / "00002.npz") as file:
            episode = file["action"]
        rows = [{k: v for k, v in row.items() if k != "seconds"} for row in moto.read_metrics(logdir / "metrics.jsonl")]
        finals.append((weights(logdir), episode, rows))
    (a, first, rows), (b, second, others) = finals
    np.testing.assert_array_equal(first, second)
    assert rows == others and all(map(same, a, b))


def test_a_player_that_dies_is_one_sentence(drawer):
    cfg = moto.build_config(task="drawer-open", preset="debug", workers=2, device="cpu")
    workers, policy = moto.RolloutWorkers(cfg, drawer), moto.MOTO(cfg, 4, False, "cpu").ema_policy
    try:
        pid = workers.pool.submit(os.getpid).result()
        waiting = workers.play(policy, [[0, 2, i] for i in range(4)], sample=True)
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(moto.UserError, match="--workers"):
            list(waiting)
    finally:
        workers.close()


def test_players_end_with_their_parent(tmp_path):
    """kill -9 of the program leaves no process behind."""
    code = ("import moto, sys, os, signal\nif __name__ == '__main__':\n"
            " cfg = moto.build_config(task='drawer-open', preset='debug', workers=2, device='cpu')\n"
            " workers = moto.RolloutWorkers(cfg, None)\n print(*{workers.pool.submit(os.getpid).result() for _ in range(8)}, flush=True)\n"
            " os.kill(os.getpid(), signal.SIGKILL)")
    done = child(code, timeout=100)                                             # they would hold its output open
    pids = [int(word) for word in done.stdout.split()]
    assert pids and done.returncode == -signal.SIGKILL
    for _ in range(200):
        if not any(os.path.exists(f"/proc/{pid}/cmdline") and Path(f"/proc/{pid}/cmdline").read_bytes() for pid in pids):
            break
        signal.sigtimedwait([], 0.1)
    else:
        raise AssertionError("players outlived their parent")


def test_bench_measures_and_its_parts_add_up(capsys):
    config = dict(task="drawer-open", preset="debug", device="cpu", precision="float32")
    assert bench.main(["--json", *flags(**config)]) == 0
    result = json.loads(capsys.readouterr().out)
    assert {"updates_per_second", "fraction_of_peak", "speedup_over_eager_fp32", "env_steps_per_second", "render_speedup",
            "peak_memory_gb"} <= result.keys()
    assert all(result[name] > 0 for name in ("updates_per_second", "env_steps_per_second", "render_speedup", "peak_memory_gb"))
    assert 0 < result["fraction_of_peak"] < 1 and set(result["forms"]) == {"plain", "eager"}
    parts = result["parts"]
    whole = parts.pop("whole update")
    assert 0.98 < sum(part["gflop"] for part in parts.values()) / whole["gflop"] < 1.02      # counted, not timed
    assert set(parts) == {"data", "encoder", "recurrent pass", "decoder and model loss", "imagination", "critic", "actor", "optimisers"}
    assert set(result["growth"]) == {"batch B", "sequence length T", "ensemble K", "horizon H", "width", "sampling"}


def test_operations_are_counted_right():
    a, b = torch.randn(8, 16), torch.randn(16, 32)
    assert bench.flops(lambda: a @ b) == 2 * 8 * 16 * 32


def test_scripted_demonstrations_succeed_are_cached_and_never_reused_wrongly(drawer, tmp_path):
    cfg = moto.build_config(task="drawer-open", device="cpu", workers=1, demos=1, demo_noise=0.0, cache=str(tmp_path))
    workers = moto.RolloutWorkers(cfg, drawer)
    path, = moto.collect_demos(cfg, workers)
    episode = moto.load_episode(path, 64, 4)
    when = episode["reward"].argmax()
    assert episode["reward"].max() == 1 and len(episode["reward"]) == when + 1 + moto.DEMO_TAIL and np.abs(episode["action"]).max() <= 1
    stamp = path.stat().st_mtime_ns
    assert moto.collect_demos(cfg, workers) == [path] and path.stat().st_mtime_ns == stamp
    shorter = dataclasses.replace(cfg, demo_noise=0.01)
    other, = moto.collect_demos(shorter, moto.RolloutWorkers(shorter, drawer))
    assert other.parent != path.parent


def test_processes_collect_the_demonstrations_that_one_process_collects(drawer, tmp_path):
    """With too little time for some attempts: the same ones are kept, with the same content."""
    kept = []
    for workers in (1, 2):
        cfg = moto.build_config(task="drawer-open", device="cpu", workers=workers, demos=3, episode_steps=53, image_size=16,
                                cache=str(tmp_path / str(workers)))
        env = moto.make_env(cfg)
        workers = moto.RolloutWorkers(cfg, env)
        kept.append([(path.name, moto.load_episode(path, 16, 4)["action"]) for path in moto.collect_demos(cfg, workers)])
        workers.close(), env.close()
    assert [name for name, _ in kept[0]] == [name for name, _ in kept[1]] != [f"attempt{i:04d}.npz" for i in range(3)]
    assert all(np.array_equal(a, b) for (_, a), (_, b) in zip(*kept))


def test_command_line_end_to_end_on_a_real_task(tmp_path):
    argv = [sys.executable, HERE / "moto.py", "--task", "drawer-open", "--preset", "debug", "--logdir", tmp_path / "run",
            "--cache", tmp_path / "demos"]
    result = subprocess.run(argv, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0 and "offline" in result.stdout, result.stderr
    assert json.loads((tmp_path / "run" / "result.json").read_text())["updates"] == 30
    result = subprocess.run(argv[:2] + ["--evaluate", tmp_path / "run", "--episodes", "1"], capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0 and json.loads(result.stdout)["episodes"] == 1, result.stderr


# ------------------------------------------------------------------------------------------------------ Franka Kitchen

needs_kitchen = pytest.mark.skipif(importlib.util.find_spec("gymnasium_robotics") is None, reason="the extra for Franka Kitchen is not installed")


def kitchen_config(**changes):
    return moto.build_config(**dict(task="kitchen-mixed", preset="debug", device="cpu", image_size=16, workers=1) | changes)


@pytest.fixture(scope="module")
def kitchen():
    env = moto.make_env(kitchen_config())
    yield env
    env.close()


def observation(env):
    """What FrankaKitchen-v1 observes, without its noise: positions and velocities of the robot, then of the objects."""
    q, v = env.data.qpos, env.data.qvel
    return np.concatenate([q[:9], v[:9], q[9:], v[9:]])


@needs_kitchen
def test_kitchen_pays_for_each_object_in_place_and_never_ends(kitchen):
    from gymnasium_robotics.envs.franka_kitchen.kitchen_env import OBS_ELEMENT_GOALS, OBS_ELEMENT_INDICES
    kitchen.reset([0, 0, 0])
    for count, name in enumerate(kitchen.targets, 1):
        kitchen.data.qpos[OBS_ELEMENT_INDICES[name]] = OBS_ELEMENT_GOALS[name]
        state = observation(kitchen)
        assert kitchen.restore(state)[1] == count
        image, reward, terminal, over, success = kitchen.step(np.zeros(9))
        assert (reward, terminal, over, success) == (count, False, False, count == 4) and image.shape == (16, 16, 3)
        kitchen.restore(state)
    kitchen.data.qpos[OBS_ELEMENT_INDICES["kettle"]] += 1                      # out again: the reward falls
    assert kitchen.restore(observation(kitchen))[1] == 3
    kitchen.data.qpos[OBS_ELEMENT_INDICES["slide cabinet"]] = OBS_ELEMENT_GOALS["slide cabinet"]       # no target of "mixed"
    assert kitchen.restore(observation(kitchen))[1] == 3


@needs_kitchen
def test_kitchen_scripts_do_their_sub_tasks_and_never_the_whole_task(kitchen, monkeypatch):
    """Every sub-task alone works at the demonstrations' noise; the drawn sequences vary, and are never the task's four."""
    cfg, alone = kitchen_config(), {}
    for name in franka_kitchen.SCRIPTS:
        monkeypatch.setattr(franka_kitchen, "draw_sequence", lambda targets, rng: [name])
        images, actions, rewards, worked = moto.demonstrate(cfg, kitchen, [0, 0, 1])
        alone[name] = worked and kitchen.in_place(name) and max(rewards) == (name in kitchen.targets) and len(actions) < 120
        monkeypatch.undo()
    assert all(alone.values()), alone
    drawn = []
    for seed in range(200):
        rng = np.random.default_rng(seed)
        drawn.append(tuple(franka_kitchen.draw_sequence(kitchen.targets, rng)))
    assert all(len(set(s)) == 4 and len(set(s) & set(kitchen.targets)) == 3 for s in drawn) and len(set(drawn)) > 20
    assert {name for s in drawn for name in s} == set(franka_kitchen.SCRIPTS)
    missing = [name for s in drawn for name in set(kitchen.targets) - set(s)]
    assert min(map(missing.count, kitchen.targets)) > 30                        # each of the four is now and then the one that is not shown


@needs_kitchen
def test_kitchen_kettle_script_forgives_a_policy_that_is_late(kitchen, monkeypatch):
    """The last push, kept up for ten steps after the kettle is in place, leaves it there, upright."""
    site, points, _ = franka_kitchen.SCRIPTS["kettle"]
    late = []
    for seed in range(4):
        rng = np.random.default_rng(seed)
        kitchen.reset([0, 0, seed])
        origin, after = kitchen.data.site(site).xpos.copy(), 0
        *way, last = [(origin + offset, grip) for offset, grip in points]
        push = franka_kitchen.reach(kitchen, *last, 0.055, near=0, most=100)
        for a in itertools.chain(*(franka_kitchen.reach(kitchen, *point, 0.08) for point in way), push):
            kitchen.env.step(np.clip(a + 0.1 * rng.standard_normal(9), -1, 1))
            after += bool(after or kitchen.in_place("kettle"))
            if after == 11:
                break
        late.append(after == 11 and kitchen.in_place("kettle"))
    assert all(late), late
    description = kitchen.describe()
    assert description["scripts"] == franka_kitchen.SCRIPTS                              # so that demonstrations made with others are not taken for these
    with monkeypatch.context() as changed:
        changed.setattr(franka_kitchen, "reach", lambda env, target: iter(()))
        assert kitchen.describe() != description


@needs_kitchen
def test_kitchen_demonstrations_that_reach_all_four_are_refused(kitchen):
    cfg = kitchen_config()
    complete = kitchen.unseen_episode()
    assert max(complete["reward"]) == 4 and not kitchen.all_four
    kitchen.all_four = True
    attempts = [moto.demonstrate(cfg, kitchen, moto.episode_seed(cfg, "evaluation", 20_000 + index)) for index in range(2)]
    kitchen.all_four = False
    assert any(max(rewards) == 4 for _, _, rewards, _ in attempts) and not any(worked for *_, worked in attempts)


def minari_set(name, states, actions, monkeypatch, folder):
    """A local data set of D4RL's layout, made without a network."""
    import gymnasium, minari
    from minari.data_collector import EpisodeBuffer
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(folder))
    buffers = [EpisodeBuffer(id=i, seed=i, options=None, observations={"observation": s}, actions=a, rewards=np.zeros(len(a)),
                             terminations=[False] * len(a), truncations=[False] * (len(a) - 1) + [True], infos={})
               for i, (s, a) in enumerate(zip(states, actions))]
    box = lambda n: gymnasium.spaces.Box(-np.inf, np.inf, (n,), np.float64)
    minari.create_dataset_from_buffers(dataset_id=name, buffer=buffers, observation_space=gymnasium.spaces.Dict(observation=box(states[0].shape[1])),
                                       action_space=box(actions[0].shape[1]))


@needs_kitchen
def test_minari_states_are_rendered_and_paid_anew(kitchen, tmp_path, monkeypatch):
    """Recorded with the rewards of another task: images are those of the simulator, rewards those of this task's objects."""
    pytest.importorskip("minari")
    rng, states, actions, truth = np.random.default_rng(0), [], [], []
    for episode in range(3):
        images, rewards = [kitchen.reset([0, 0, episode])], []
        sequence = ["kettle"] if episode == 1 else ["slide cabinet"]
        kitchen.script = franka_kitchen.play_script(kitchen, sequence)
        s, a = [observation(kitchen)], []
        for _ in range(45):
            a.append(np.clip(kitchen.scripted_action() + 0.02 * rng.standard_normal(9), -1, 1))
            image, reward, *_ = kitchen.step(a[-1])
            s.append(observation(kitchen)), images.append(image), rewards.append(reward)
        states.append(np.array(s)), actions.append(np.array(a)), truth.append((np.stack(images), np.array(rewards)))
    minari_set("test/kitchen-v0", states, actions, monkeypatch, tmp_path / "minari")
    cfg = kitchen_config(data="minari:test/kitchen-v0", workers=2, cache=str(tmp_path / "cache"))
    workers = moto.RolloutWorkers(cfg, kitchen)
    try:
        paths = moto.offline_paths(cfg, workers)
        assert len(paths) == 3 and truth[1][1].max() == 1 and truth[0][1].max() == 0
        for path, (images, rewards), a in zip(paths, truth, actions):
            episode = moto.load_episode(path, 16, 9)
            np.testing.assert_array_equal(episode["reward"], rewards)
            np.testing.assert_allclose(episode["action"], a, atol=1e-6)
            error = lambda mine, theirs: np.abs(mine.astype(int) - theirs).mean()          # a picture after a step is 2 ms older than
            exact = error(episode["image"], images)                                        # the state: single pixels at edges differ
            assert exact < 0.3 and error(episode["image"][1:], images[:-1]) > 3 * exact, exact
        stamp = paths[0].stat().st_mtime_ns
        paths[1].unlink()                                                       # interrupted: what is there stays, what lacks is made
        assert moto.offline_paths(cfg, workers) == paths and paths[0].stat().st_mtime_ns == stamp and paths[1].exists()
    finally:
        workers.close()


class Recorded:
    """A Minari data set whose episodes have these observations."""

    def __init__(self, observations):
        self.observations = observations

    def iterate_episodes(self):
        return [type("Episode", (), {"observations": self.observations, "actions": np.zeros((4, 9))})]


@needs_kitchen
@pytest.mark.parametrize("fault, words", [
    ("another robot", r"float64 \(5, 17\)"), ("damaged", "minari download"), ("missing", "minari download"),
    ("another task", "kitchen-partial"), ((np.zeros((5, 59)),), "observations tuple"),
    ({"state": np.zeros((5, 59))}, "observations NoneType"), ({"observation": np.full((5, 59), np.nan)}, "finite")])
def test_a_wrong_minari_set_is_one_sentence(kitchen, tmp_path, monkeypatch, fault, words):
    minari = pytest.importorskip("minari")
    width = 17 if fault == "another robot" else 59
    minari_set("test/wrong-v0", [np.zeros((5, width))], [np.zeros((4, 9))], monkeypatch, tmp_path)
    if fault == "damaged":
        for path in tmp_path.rglob("*.hdf5"):
            path.write_bytes(path.read_bytes()[:200])
    if not isinstance(fault, str):
        monkeypatch.setattr(minari, "load_dataset", lambda *args, **kwargs: Recorded(fault))
    monkeypatch.setattr(socket.socket, "connect", lambda *args: (_ for _ in ()).throw(OSError("no network")))
    cfg = kitchen_config(data="minari:test/" + ("missing-v0" if fault == "missing" else "wrong-v0"), cache=str(tmp_path / "cache"))
    if fault == "another task":
        cfg = dataclasses.replace(cfg, task="hammer")
    with pytest.raises(moto.UserError, match=words):
        moto.offline_paths(cfg, moto.RolloutWorkers(cfg, kitchen))


@needs_kitchen
def test_a_kitchen_run_whose_scripts_never_complete_all_four_ends_with_its_result(tmp_path, capsys):
    for index in range(2):
        moto.save_episode(tmp_path / f"{index}.npz", np.zeros((13, 16, 16, 3), np.uint8), np.zeros((12, 9)), np.zeros(12))
    assert moto.main(flags(task="kitchen-mixed", preset="debug", device="cpu", image_size=16, workers=1, data=tmp_path,
                           episode_steps=12, offline_updates=2, online_episodes=0, logdir=tmp_path / "run")) == 0
    assert "no combination.png" in capsys.readouterr().err
    assert {"result.json", "eval.gif", "prediction.png"} <= {path.name for path in (tmp_path / "run").iterdir()}


def test_kitchen_without_its_extra_names_the_command(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(moto.UserError, match="pip install gymnasium-robotics"):
        moto.make_env(kitchen_config())


@needs_kitchen
def test_kitchen_from_the_command_line(tmp_path):
    """Demonstrations, both phases, counts of objects, and the paper's Figure 4."""
    argv = flags(task="kitchen-mixed", preset="debug", device="cpu", image_size=16, workers=2, offline_updates=4, online_episodes=1,
                 updates_per_episode=2, final_episodes=2, demos=2, cache=tmp_path / "demos", logdir=tmp_path / "run")
    done = child("import moto, sys\nif __name__ == '__main__':\n sys.exit(moto.main(sys.argv[1:]))", *argv)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert 0 <= result["final_completed"] <= 4 and sum(result["final_counts"]) == 2 and (tmp_path / "run" / "combination.png").stat().st_size > 10_000
    for path in (tmp_path / "demos").rglob("attempt*.npz"):
        assert moto.load_episode(path, 16, 9)["reward"].max() <= 3
    assert reproduce.main([str(tmp_path / "run")]) == 0


# ------------------------------------------------------------------------------------------------------ learning

def test_moto_beats_its_own_behaviour_prior(tmp_path):
    """The demonstrator dawdles, and so does its clone. Fine-tuned through the model, the policy is there sooner."""
    data = dot_episodes(tmp_path / "data", 12, speed=0.3, noise=0.3)
    common = TINY | dict(data=data, batch=8, length=8, channels=8, deter=64, stoch=8, hidden=64, horizon=5, offline_updates=200,
                         online_episodes=16, updates_per_episode=15, final_episodes=50, save_every=1000, model_lr=3e-3, actor_lr=1e-3,
                         critic_lr=2e-3, gamma=0.9, beta=0.02, log_every=50, reward_head="bernoulli", bc_repr_weight=1.0)
    scores = {}
    for name, own in (("prior", {"variant": "bc", "offline_updates": 440}), ("moto", {})):
        assert moto.main(flags(**(common | own | {"logdir": tmp_path / name}))) == 0
        scores[name] = json.loads((tmp_path / name / "result.json").read_text())
    assert scores["moto"]["final_success"] >= 0.8, scores
    assert scores["moto"]["final_return"] >= 1.25 * scores["prior"]["final_return"] > 0, scores


@pytest.mark.parametrize("variant", ["bc", "iql", "cql"])
def test_the_baselines_learn_the_toy_task(tmp_path, variant):
    data = dot_episodes(tmp_path / "data", 20, speed=1.0, noise=0.2)
    assert moto.main(flags(**(TINY | dict(variant=variant, data=data, batch=16, length=8, channels=8, deter=48, stoch=16, hidden=64,
                                          offline_updates=300, online_episodes=0, final_episodes=40, save_every=1000, actor_lr=1e-3, gamma=0.9,
                                          reward_head="bernoulli", logdir=tmp_path / "run", shift=1)))) == 0
    assert json.loads((tmp_path / "run" / "result.json").read_text())["final_success"] >= 0.7


# ------------------------------------------------------------------------------------------------------ the notebook

@pytest.fixture(scope="module")
def notebook():
    import nbformat
    return nbformat.read(HERE / "moto_walkthrough.ipynb", as_version=4)


def test_file_notebook_and_tests_have_the_same_equations(notebook):
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    headings = [int(n) for n in re.findall(r"^## Eq (\d+) · \S", text, re.M)]
    assert headings == sorted(headings)                                       # in the order of the file
    functions = {int(n) for n in re.findall(r'"""Eq (\d+)', (HERE / "moto.py").read_text())}
    tests = {int(n) for n in re.findall(r"^def test_eq(\d+)_", (HERE / "test_moto.py").read_text(), re.M)}
    assert set(headings) == functions == tests == set(range(1, 17))


def test_the_notebook_shows_the_source_as_it_is_now(notebook):
    shown = 0
    for cell in notebook.cells:
        names = re.findall(r"\bshow\(moto\.([\w.]+)\)", cell.source) if cell.cell_type == "code" else []
        outputs = [o["data"]["text/markdown"] for o in cell.get("outputs", []) if "text/markdown" in o.get("data", {})]
        assert len(outputs) == len(names)
        for name, output in zip(names, outputs):
            thing = moto
            for part in name.split("."):
                thing = getattr(thing, part)
            assert output == f"```python\n{inspect.getsource(thing)}```", f"{name} has changed: execute the notebook again"
            shown += 1
    assert shown >= 16


def test_the_committed_notebook_ran_in_order_and_is_static_and_small(notebook):
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [o for cell in code for o in cell.outputs]
    assert not [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]
    assert {kind for o in outputs for kind in o.get("data", {})} <= {"text/plain", "text/markdown", "image/png"}
    for cell in code:                                # every picture that is drawn is there (Kitchen's need the extra)
        drawn = len(re.findall(r"^ *picture\(", cell.source, re.M))
        assert drawn == sum("image/png" in o.get("data", {}) for o in cell.outputs), cell.source
    assert (HERE / "moto_walkthrough.ipynb").stat().st_size < 1.5e6


def test_the_notebook_runs(notebook):
    from nbclient import NotebookClient
    NotebookClient(copy.deepcopy(notebook), timeout=900, resources={"metadata": {"path": HERE}}).execute()
