"""Tests of moto.py: every equation against an independent oracle, then data, resuming, errors,
simulators, command line, learning; and of what is in experiments/.

    python -m pytest -q test_moto.py
"""
import copy, dataclasses, importlib.util, inspect, itertools, json, math, os, pickle, re, shutil
import signal, socket, subprocess, sys
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch
import torch.distributions as D

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))                            # for the processes that the tests start
moto = sys.modules.get("moto")
if getattr(moto, "__file__", None) != str(HERE / "moto.py"):         # or it is PyPI's moto
    spec = importlib.util.spec_from_file_location("moto", HERE / "moto.py")
    moto = sys.modules["moto"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(moto)
sys.path.insert(0, str(HERE / "experiments"))
import baselines, bench, demonstrations, diagnose, franka_kitchen, gym_task, meta_world, pictures
import reproduce, rollout_workers, toy
from rollout_workers import RolloutWorkers

TINY = dict(
    task="gym:test/Dot-v0", device="cpu", precision="float32", workers=1, image_size=16,
    action_repeat=1, episode_steps=12, batch=4, length=6, channels=4, deter=16, stoch=6, hidden=16,
    ensemble=3, hold=2, horizon=3, critics=3, warmup=1, offline_updates=6, online_episodes=2,
    updates_per_episode=4, eval_every=100, final_episodes=2, log_every=1, save_every=1,
    offline_fraction=0.5, shift=0)


def tiny(**changes):
    return moto.build_config(**(TINY | changes))


def flags(**values):
    return reproduce.flags(values)


def tiny_flags(**changes):
    return reproduce.flags(TINY | changes)


def tiny_agent(terminates=True, **changes):
    return moto.make_agent(tiny(**changes), 2, terminates, "cpu")


def online_agent(**changes):
    """An agent whose every update of a `practice_batch` moves the actor, too."""
    agent = tiny_agent(**(dict(warmup=0) | changes))
    agent.episodes = 1
    return agent


def randomised(module, scale=0.3):
    """The module with noise on its parameters: a correction that begins at zero is none."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(scale * torch.randn_like(parameter))
    return module


def batch_of(cfg, B=4, T=6, A=2, seed=0):
    g = torch.Generator().manual_seed(seed)
    first = torch.zeros(B, T, dtype=torch.bool)
    first[:, 0] = True
    shape = B, T, cfg.image_size, cfg.image_size, 3
    return {"image": torch.randint(0, 255, shape, generator=g, dtype=torch.uint8),
            "a": torch.rand(B, T, A, generator=g) * 1.8 - 0.9,
            "r": torch.rand(B, T, generator=g), "is_terminal": torch.zeros(B, T),
            "is_first": first, "valid": torch.ones(B, T - 1)}


def practice_batch(cfg, seed=0, **sizes):
    """What a batch is once features are kept: these, and decisions without images."""
    batch, decisions = batch_of(cfg, seed=seed, **sizes), batch_of(cfg, 20, seed=seed + 100)
    for part in (batch, decisions):
        g = torch.Generator().manual_seed(seed)
        part["e"] = torch.rand(*part["r"].shape, cfg.hidden, generator=g) * 2 - 1
    del decisions["image"]
    return batch | {"decisions": decisions}


def prepared(batch):
    """What model_loss takes: images as numbers, and features."""
    e = torch.rand(*batch["a"].shape[:2], TINY["hidden"]) * 2 - 1
    return batch | {"x": moto.to_image(batch["image"]), "e": e}


def flat(parameters):
    return torch.cat([p.detach().flatten().clone() for p in parameters])


def random_image():
    return np.random.default_rng(0).integers(0, 255, (16, 16, 3), dtype=np.uint8)


def read_json(path):
    return json.loads(path.read_text())


@pytest.fixture
def agent():
    return tiny_agent()


# --------------------------------------------------------------------------------------------------
# The toy task
# --------------------------------------------------------------------------------------------------

class Dot(toy.Dot):
    """The blob of the walkthrough, with actions that are mapped, too (a full one, 2, moves it 0.2),
    and an end on the ring where asked for."""
    action_space = gymnasium.spaces.Box(-2.0, 2.0, (2,), np.float32)

    def __init__(self, render_mode=None, terminates=False):
        super().__init__(render_mode)
        self.terminates = terminates

    def step(self, action):
        p, reward, _, over, info = super().step(np.asarray(action) / 2)
        return p, reward, self.terminates and info["success"], over, info


for name, kwargs in (("test/Dot-v0", {}), ("test/DotEnds-v0", {"terminates": True})):
    if name not in gymnasium.registry:
        gymnasium.register(name, Dot, kwargs=kwargs)


def dot_episodes(folder, count, speed=0.4, noise=0.5, seed=0, steps=12, **changes):
    """Successful episodes of a slow and noisy demonstrator, in the documented layout."""
    env, rng, kept, attempt = moto.make_env(tiny(**changes)), np.random.default_rng(seed), 0, 0
    while kept < count:
        images, actions, rewards = [env.reset([7, seed, attempt])], [], []
        attempt += 1
        for _ in range(steps):
            p = env.env.unwrapped.p
            towards = -speed * p / max(np.linalg.norm(p), 0.2)
            a = np.clip(towards + noise * rng.standard_normal(2), -1, 1)
            image, reward, terminal, over, _ = env.step(a)
            images.append(image)
            actions.append(a)
            rewards.append(reward)
            if over:
                break
        if any(rewards):
            moto.save_episode(Path(folder) / f"{kept:03d}.npz", images, actions, rewards, terminal)
            kept += 1
    return folder


@pytest.fixture(scope="module")
def dots(tmp_path_factory):
    return dot_episodes(tmp_path_factory.mktemp("dots"), 6)


# --------------------------------------------------------------------------------------------------
# The equations
# --------------------------------------------------------------------------------------------------

def test_eq01_filter_follows_features_and_begins_anew_at_an_episode_boundary(agent):
    e, a = torch.rand(4, 6, 16) * 2 - 1, batch_of(agent.cfg)["a"]
    first = torch.zeros(4, 6, dtype=torch.bool)
    first[:, 0] = first[:, 3] = True

    def run(e, a):
        torch.manual_seed(0)
        return agent.model.observe(e, a, first)
    h, z, mean, std = run(e, a)
    e2, a2 = e.clone(), a.clone()
    e2[:, :3], a2[:, :4] = 0, 0           # everything before the boundary, and the action into it
    h2, _, mean2, _ = run(e2, a2)
    assert torch.equal(mean[:, 3:], mean2[:, 3:])
    assert not torch.allclose(mean[:, 1:3], mean2[:, 1:3])
    e3 = e.clone()
    e3[:, 4] = 0                          # e_4 changes s_4, nothing before it, and h_4 not at all
    h3, _, mean3, _ = run(e3, a)
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
    first = grads[0].view(4, 7, 5).abs()
    assert first[[0, 2, 3]].sum() == 0 and first[1].sum() > 0
    assert all(g[[0, 2, 3]].abs().sum() == 0 for g in grads[2:])


def test_eq02_imagination_draws_a_head_afresh_at_each_step(agent):
    priors = agent.model.priors
    with torch.no_grad():                 # head k predicts mean k and the smallest deviation
        for p in priors.weights:
            p.zero_()
        priors.biases[-1][..., :6] = torch.arange(3.0)[:, None, None]
        priors.biases[-1][..., 6:] = -30
    state = [torch.zeros(60, size) for size in (agent.cfg.deter, agent.cfg.stoch, 16)]
    imagined = moto.imagine(agent.model, agent.ema_policy, agent.actor, *state, 2, 2)
    k = imagined["feat"][1:, :, 16:].mean(-1).round().long()
    assert set(k.flatten().tolist()) == {0, 1, 2}
    assert all((k[i] != k[i + 1]).any() for i in range(3))


@pytest.mark.parametrize("head", ["bernoulli", "normal"])
def test_eq03_decoder_losses_are_log_likelihoods(head):
    """Of the images half are decoded."""
    model = moto.WorldModel(tiny(reward_head=head), 2, True)
    feat, x, e = torch.randn(2, 5, 22), torch.rand(2, 5, 3, 16, 16) - 0.5, torch.rand(2, 5, 16)
    r, terminal = (torch.rand(2, 2, 5) > 0.5).float()
    torch.manual_seed(0)
    losses = moto.decoder_losses(model, feat, x, e, r, terminal)
    torch.manual_seed(0)
    chosen = torch.randperm(10)[:5]
    constant = 0.5 * math.log(2 * math.pi)                    # the Normals' losses leave it out
    pictures = D.Normal(model.decoder(feat.flatten(0, 1)), 1.0).log_prob(x.flatten(0, 1))
    image = -pictures.sum((1, 2, 3))[chosen] - 3 * 16 * 16 * constant
    feature = -D.Normal(model.feature(feat), 1.0).log_prob(e).sum(-1) - 16 * constant
    raw = model.reward(feat).squeeze(-1)
    if head == "bernoulli":
        reward = -D.Bernoulli(logits=raw).log_prob(r)
    else:
        reward = -D.Normal(raw, 1.0).log_prob(r) - constant
    continuation = D.Bernoulli(logits=model.continuation(feat).squeeze(-1))
    torch.testing.assert_close(losses["image"], image.mean(), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(losses["feature"], feature.mean())
    torch.testing.assert_close(losses["reward"], reward.mean())
    torch.testing.assert_close(losses["continuation"], -continuation.log_prob(1 - terminal).mean())
    draws = [moto.decoder_losses(model, feat, x, e, r, terminal)["image"] for _ in range(9)]
    assert torch.stack(draws).unique().numel() > 5            # drawn afresh


def test_eq04_model_loss_is_the_sum_of_its_parts_and_reaches_every_parameter(agent):
    cfg = agent.cfg
    torch.manual_seed(0)
    loss, metrics = moto.model_loss(agent.model, prepared(batch_of(cfg)))
    expected = (metrics["model/image"] + cfg.reward_scale * metrics["model/reward"]
                + metrics["model/kl"] + metrics["model/continuation"] + metrics["model/feature"])
    torch.testing.assert_close(loss.detach(), expected)
    agent.model.cfg = dataclasses.replace(cfg, free_nats=0.0)
    loss, _ = moto.model_loss(agent.model, prepared(batch_of(cfg)))
    grads = torch.autograd.grad(loss, list(agent.model.parameters()))    # raises on an unused one
    assert all(g.abs().sum() > 0 for g in grads)


def test_eq05_kl_against_torch_distributions_and_its_balance():
    g = torch.Generator().manual_seed(0)
    r = lambda *s: torch.randn(*s, generator=g)
    q = [r(4, 6).requires_grad_(), r(4, 6).exp().requires_grad_()]
    p = [r(3, 4, 6).requires_grad_(), r(3, 4, 6).exp().requires_grad_()]
    oracle = D.kl_divergence(D.Independent(D.Normal(*q), 1), D.Independent(D.Normal(*p), 1))
    torch.testing.assert_close(moto.kl_normal(*q, *p), oracle)
    balanced = moto.kl_balanced(q, p, 0.8, 0.0)
    torch.testing.assert_close(balanced, oracle)       # balancing changes the gradient alone
    full = torch.autograd.grad(oracle.sum(), [p[0], q[0]], retain_graph=True)
    shares = torch.autograd.grad(balanced.sum(), [p[0], q[0]])
    torch.testing.assert_close(shares[0], 0.8 * full[0])
    torch.testing.assert_close(shares[1], 0.2 * full[1])
    clipped = moto.kl_balanced(q, p, 0.8, 1e6)
    assert (clipped == 1e6).all()
    assert torch.autograd.grad(clipped.sum(), q[0])[0].abs().sum() == 0


def test_eq06_disagreement_is_the_spread_of_the_heads():
    means = torch.randn(5, 7, 3)
    expected = means.numpy().std(0).mean(-1)
    torch.testing.assert_close(moto.disagreement(means).numpy(), expected, rtol=1e-5, atol=1e-6)
    agreed = means[:1].expand(5, 7, 3).clone().requires_grad_()
    assert moto.disagreement(agreed).abs().max() < 1e-5
    moto.disagreement(agreed).sum().backward()
    assert torch.isfinite(agreed.grad).all()


def test_eq06_disagreement_is_higher_off_the_data_after_training():
    """The priors are fitted by Eq 5 to a posterior that is known where the first half of h varies
    and the rest is zero."""
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
    """u is below its mean on the data, 0.25; three times above it; below it."""
    r, u = torch.tensor([1.0, 0.0, 0.5]), torch.tensor([0.2, 1.0, 0.1])
    expected = torch.tensor([1.0, -1.5, 0.5])
    torch.testing.assert_close(moto.penalised_reward(r, u, 0.5, 0.25), expected)
    assert torch.equal(moto.penalised_reward(r, u, 0.0, 0.25), r)
    u.requires_grad_()
    moto.penalised_reward(r, u, 0.5, 0.25).sum().backward()
    torch.testing.assert_close(u.grad, torch.tensor([0.0, -2.0, 0.0]))    # none below that mean


def expanded(agent, alpha):
    """V of Eq 9 from some states, under this penalty."""
    agent.cfg = dataclasses.replace(agent.cfg, alpha=alpha)
    torch.manual_seed(0)
    return agent.expand(torch.randn(40, 22), torch.rand(40, 16))


def test_eq07_penalty_lowers_the_value_and_is_logged(agent):
    agent.update(practice_batch(agent.cfg))                   # there is a mean disagreement now
    (V, imagined, metrics), (lower, _, penalised) = expanded(agent, 0.0), expanded(agent, 3.0)
    excess = (imagined["u"] / agent.model.disagreement_mean - 1).clamp(min=0)
    assert excess.max() > 0 and (excess == 0).any()
    torch.testing.assert_close(penalised["imagined/penalty"], 3 * excess.mean())
    assert metrics["imagined/penalty"] == 0
    assert (lower <= V + 1e-5).all() and lower[0].mean() < V[0].mean() - 0.01


def test_eq07_the_mean_disagreement_is_a_running_one(agent):
    first, second = (agent.update(practice_batch(agent.cfg, seed=i))["model/disagreement"]
                     for i in range(2))
    assert float(agent.model.disagreement_mean) == pytest.approx(0.99 * first + 0.01 * second)
    assert first != second


@pytest.mark.parametrize("H, hold", [(3, 2), (2, 3), (2, 1), (0, 2)])
def test_eq08_imagination_holds_a_decision_for_k_steps(H, hold):
    """The correction is decided at every k-th state and kept; the behaviour prior is read anew at
    each state, and the sum clipped."""
    agent = online_agent(bound=2.0)
    model, policy, actor = agent.model, randomised(agent.ema_policy), randomised(agent.actor)
    h, z, e = torch.randn(5, 16), torch.randn(5, 6), torch.rand(5, 16) * 2 - 1
    imagined = moto.imagine(model, policy, actor, h, z, e, H, hold)
    feat, u, es, ds = (imagined[name] for name in ("feat", "u", "e", "d"))
    assert feat.shape == (H * hold + 1, 5, 22) and u.shape == (H * hold, 5)
    assert es.shape == (H + 1, 5, 16) and ds.shape == (H + 1, 5, 2)
    assert torch.equal(feat[0], torch.cat([h, z], -1)) and not feat.requires_grad
    seen = [e, *model.feature(feat[1:])]                      # the feature of every state
    torch.testing.assert_close(es, torch.stack(seen[::hold]))
    b, decided = policy.prior(es).mode, actor(es)
    torch.testing.assert_close(ds, ((b + 2 * decided).clamp(-1, 1) - b) / 2)
    clipped = 0
    for i in range(H * hold):                                 # s^i, a^i give h^{i+1} and u^i
        a = policy.prior(seen[i]).mode + 2 * decided[i // hold]
        clipped += int((a.abs() > 1).sum())
        following = model.recurrence(feat[i][:, :16], feat[i][:, 16:], a.clamp(-1, 1))
        torch.testing.assert_close(following, feat[i + 1][:, :16])
        torch.testing.assert_close(moto.disagreement(model.prior(following)[0]), u[i])
    assert clipped or not H


@pytest.mark.parametrize("lam", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("H", [0, 1, 4])
def test_eq09_value_expansion_against_a_naive_loop(lam, H):
    g = torch.Generator().manual_seed(1)
    r, d, q = (torch.rand(n, 3, generator=g) for n in (H, H, H + 1))

    def n_step(i, n):                                         # n rewards, then Q
        total, product = torch.zeros(3), torch.ones(3)
        for j in range(i, i + n):
            total, product = total + product * r[j], product * d[j]
        return total + product * q[i + n]
    V = moto.value_expansion(r, d, q, lam)
    assert V.shape == (H + 1, 3)
    for i in range(H + 1):
        left = H - i
        mixed = sum((1 - lam) * lam ** n * n_step(i, n) for n in range(left))
        torch.testing.assert_close(V[i], mixed + lam ** left * n_step(i, left))


@pytest.mark.parametrize("lam", [1.0, 0.3])
def test_eq09_expand_against_a_naive_loop_over_single_steps(lam):
    """With lam 1: all H k penalised rewards, discounted by gamma and the continuation, then Q; V^j
    begins at the j-th decision. Else the mixture of that after 0 to H - j decisions."""
    agent, (H, k) = online_agent(critics=1, lam=lam, gamma=0.9, alpha=0.5), (3, 2)
    for name in ("actor", "target", "model"):
        randomised(agent.modules[name])
    agent.model.disagreement_mean.fill_(0.3)
    V, imagined, _ = agent.expand(torch.randn(5, 22), torch.rand(5, 16) * 2 - 1)
    feat, u = imagined["feat"], imagined["u"]
    assert V.shape == (H + 1, 5)
    for j, n in itertools.product(range(H + 1), range(5)):
        total, product, mixture = 0.0, 1.0, 0.0
        for i in range(j * k, H * k + 1):
            if i % k == 0:                                        # stop here, after i / k - j
                q = agent.target(*(imagined[name][i // k, n, None] for name in "ed")).squeeze()
                weight = lam ** (i // k - j) * (1.0 if i == H * k else 1 - lam)
                mixture = mixture + weight * (total + product * q)
            if i < H * k:
                r = agent.model.expected_reward(feat[i + 1, n])
                total = total + product * (r - 0.5 * max(0, u[i, n] / 0.3 - 1))
                product = product * 0.9 * agent.model.expected_continuation(feat[i + 1, n])
        torch.testing.assert_close(V[j, n], mixture)


def test_eq09_accumulate_makes_one_step_of_a_decision():
    reward, discount = torch.rand(2, 3, 4), torch.rand(2, 3, 4)
    total, product = torch.zeros(2, 3), torch.ones(2, 3)
    for i in range(4):
        total = total + product * reward[..., i]
        product = product * discount[..., i]
    torch.testing.assert_close(moto.accumulate(reward, discount), (total, product))
    ends = moto.accumulate(torch.tensor([1., 2, 4]), torch.tensor([0.5, 0, 0.5]))
    assert [float(value) for value in ends] == [2.0, 0.0]     # 4 is beyond the end


@pytest.mark.parametrize("hold", [1, 3])
def test_eq10_real_decisions_against_a_naive_loop(hold):
    """Pieces of random episodes, some of which end as the task does: within such an end a decision
    counts, over any other boundary it does not."""
    g, N, gamma, bound = torch.Generator().manual_seed(2), 60, 0.9, 0.25
    a, b = (torch.rand(N, hold, 2, generator=g) * 2 - 1 for _ in range(2))
    r, valid = torch.rand(N, hold, generator=g), (torch.rand(N, hold, generator=g) > 0.2).float()
    over = torch.nn.functional.pad(1 - valid[:, 1:], (0, 1), value=1)     # an episode's last step
    terminal = over * (torch.rand(N, hold, generator=g) > 0.5) * valid
    d, reward, discount, weight = moto.real_decisions(a, b, r, terminal, valid, bound, gamma)
    assert d.shape == (N, 2) and reward.shape == discount.shape == weight.shape == (N,)
    early = torn = 0
    for n in range(N):
        total, product, corrections = 0.0, 1.0, []
        for i in range(hold):
            if not valid[n, i]:
                product = None
                break
            corrections.append((a[n, i] - b[n, i]) / bound)
            total, product = total + product * r[n, i], product * gamma
            if terminal[n, i]:
                product = 0.0
                break
        assert weight[n] == (product is not None)
        torn += bool(corrections) and product is None
        if product is not None:
            early += len(corrections) < hold
            torch.testing.assert_close(reward[n], torch.as_tensor(total))
            assert float(discount[n]) == pytest.approx(product)
            torch.testing.assert_close(d[n], sum(corrections) / len(corrections))
    assert hold == 1 or early and torn


def test_eq10_with_decisions_of_one_step_the_target_is_that_of_value_expansion():
    """y_t = r_{t+1} + gamma (r~^0 + gamma r~^1 + gamma^2 Q), the recorded action for d; but zero
    beyond a task's end, and the value goes on beyond a time limit, whose transitions are valid."""
    real, imagined, q = torch.rand(6, 1), torch.rand(2, 6), torch.rand(3, 6)
    a, gamma, ends = torch.rand(6, 1, 2), 0.9, torch.tensor([[0.], [1], [0], [0], [0], [0]])
    steps = moto.accumulate(imagined[..., None], torch.full((2, 6, 1), gamma))
    V0 = moto.value_expansion(*steps, q, 1.0)[0]
    d, reward, discount, weight = moto.real_decisions(
        a, torch.zeros_like(a), real, ends, torch.ones(6, 1), 1.0, gamma)
    beyond = imagined[0] + gamma * imagined[1] + gamma ** 2 * q[2]
    expected = (real + gamma * (1 - ends) * beyond[:, None])[:, 0]
    torch.testing.assert_close(moto.critic_target(reward, discount, V0), expected)
    assert weight.all() and torch.equal(d, a[:, 0])


def test_eq11_critic_loss(agent):
    q, y = torch.rand(2, 4, 3, requires_grad=True), torch.rand(4, 3, requires_grad=True)
    w = (torch.rand(4, 3) > 0.5).float()
    loss = moto.critic_loss(q, y, w, 50.0)
    expected = sum(((q[k] - y) ** 2 * w).sum() / w.sum() for k in (0, 1)) / 2500
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert y.grad is None and q.grad.abs().sum() > 0
    out = agent.critic(torch.randn(4, 3, 16), torch.randn(4, 3, 2))
    assert out.shape == (3, 4, 3) and not torch.allclose(out[0], out[1])


def test_eq11_the_smaller_of_two_different_critics_is_drawn(monkeypatch):
    critic = moto.Critic(tiny(gamma=0.0), 2, heads=5)
    with torch.no_grad():                                     # critic k says k everywhere
        critic.nets.weights[-1].zero_()
        critic.nets.biases[-1].copy_(torch.arange(5.0)[:, None, None])
    found = [critic.smaller_of_two(torch.rand(3, 4, 16), torch.rand(3, 4, 2)) for _ in range(500)]
    assert all(q.shape == (3, 4) and (q == q[0, 0]).all() for q in found)
    counts = np.bincount([int(q[0, 0]) for q in found], minlength=5) / 500
    np.testing.assert_allclose(counts, [0.4, 0.3, 0.2, 0.1, 0], atol=0.07)
    assert counts[4] == 0                                     # the largest is never the smaller
    monkeypatch.setattr(critic, "heads", 2)
    monkeypatch.setattr(critic, "forward", lambda e, d: torch.stack([d[..., 0], -d[..., 0]]))
    d = torch.randn(6, 2)
    torch.testing.assert_close(critic.smaller_of_two(torch.rand(6, 16), d), -d[:, 0].abs())


def critic_batch(agent):
    """States after 8 decisions of k = 2 steps, and these steps, for critic_terms: one leads out of
    its episode, one begins with another's last step, one ends as the task does, one earlier."""
    torch.manual_seed(0)
    batch = batch_of(agent.cfg, B=8, T=3) | {"e": torch.rand(8, 3, 16) * 2 - 1}
    batch["valid"][0, 1] = batch["valid"][1, 0] = batch["valid"][3, 1] = 0
    batch["is_terminal"][2, 2] = batch["is_terminal"][3, 1] = 1
    return torch.randn(8, 22), batch


def test_decisions_are_filtered_from_before_their_beginning(agent):
    """The state after the last step, and the last k + 1 steps; an episode begins in one of them."""
    batch = batch_of(agent.cfg) | {"e": torch.rand(4, 6, 16)}
    batch["is_first"][2, 3] = True
    batch["valid"] = (~batch["is_first"][:, 1:]).float()
    torch.manual_seed(0)
    feat, last = agent.filter(dict(batch))
    torch.manual_seed(0)
    h, z, *_ = agent.model.observe(batch["e"], batch["a"], batch["is_first"])
    torch.testing.assert_close(feat, torch.cat([h, z], -1)[:, 5])
    assert all(torch.equal(last[name], batch[name][:, 3:]) for name in batch)
    assert last["valid"].shape == (4, 2)


def test_eq11_critic_terms_against_a_naive_loop():
    """With one critic and no imagination: y_t = r_{t+1} + gamma r_{t+2} + gamma^2 Q'(e_{t+2})."""
    agent = online_agent(horizon=0, critics=1, gamma=0.9, bound=0.5)
    for module in (agent.actor, agent.critic, agent.target, agent.ema_policy.prior):
        randomised(module)
    feat, batch = critic_batch(agent)
    e, a, r, policy, terms = batch["e"], batch["a"], batch["r"], agent.ema_policy, []
    Q = lambda critic, e, d: critic(e[None], d[None]).squeeze()

    def effective(e):
        prior = policy.prior(e).mode
        return ((prior + 0.5 * agent.actor(e)).clamp(-1, 1) - prior) / 0.5
    for n in range(8):
        if not batch["valid"][n, 0]:
            continue
        errors = [(a[n, i + 1] - policy.prior(e[n, i]).mode) / 0.5 for i in (0, 1)]
        y, d = r[n, 1], errors[0]
        if not batch["is_terminal"][n, 1]:
            if not batch["valid"][n, 1]:
                continue
            d = sum(errors) / 2
            y = y + 0.9 * r[n, 2]
            if not batch["is_terminal"][n, 2]:
                y = y + 0.81 * Q(agent.target, e[n, 2], effective(e[n, 2]))
        terms.append(((Q(agent.critic, e[n, 0], d) - y.detach()) / 10) ** 2)
    loss, metrics = agent.critic_terms(feat, batch)
    assert len(terms) == 6
    torch.testing.assert_close(loss, torch.stack(terms).mean())


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_eq11_imagined_is_the_share_of_imagined_transitions(share):
    """Those are decisions of the policy, with V^j itself as the target."""
    agent = online_agent(imagined=share)
    randomised(agent.actor)
    agent.model.disagreement_mean.fill_(0.5)
    feat, batch = critic_batch(agent)
    torch.manual_seed(1)
    V, imagined, _ = agent.expand(feat, batch["e"][:, -1])
    q = agent.critic(imagined["e"], imagined["d"])[:, :-1]
    on_imagined = ((q - V[:-1]) * (1 - agent.cfg.gamma)).square().sum(0).mean()
    torch.manual_seed(1)
    loss, metrics = agent.critic_terms(feat, batch)
    assert ("critic/imagined" in metrics) == (share > 0)
    mixed = (1 - share) * metrics["critic/real"] + share * on_imagined
    torch.testing.assert_close(loss, mixed)
    torch.manual_seed(1)
    other, _ = agent.critic_terms(feat, batch | {"r": batch["r"] + 1})
    assert torch.equal(loss, other) == (share == 1)           # real rewards do not matter then


def test_eq12_target_is_a_moving_average(agent):
    old = copy.deepcopy(agent.target)
    agent.update(practice_batch(agent.cfg))
    modules = old, agent.target, agent.critic
    for before, after, fast in zip(*(module.parameters() for module in modules)):
        torch.testing.assert_close(after, 0.98 * before + 0.02 * fast)
        assert not torch.equal(before, after)


def tanh_normal(policy):
    """The oracle of Eq 15, from torch.distributions."""
    return D.TransformedDistribution(D.Normal(policy.mean, policy.std), [D.TanhTransform()])


def test_eq13_behaviour_loss_is_the_likelihood_of_the_leaving_action(agent):
    e, a, prior = torch.randn(2, 5, 16), torch.rand(2, 5, 2) * 1.8 - 0.9, agent.prior
    w = torch.tensor([[1., 1, 0, 1], [0, 1, 1, 1]])
    total = sum(-w[b, t] * tanh_normal(prior(e[b, t])).log_prob(a[b, t + 1]).sum()
                for b in range(2) for t in range(4))
    loss = moto.behaviour_loss(prior, e, a, w)
    torch.testing.assert_close(loss, total / w.sum(), rtol=1e-4, atol=1e-4)
    assert torch.isfinite(moto.behaviour_loss(prior, e, torch.ones(2, 5, 2), w))
    assert moto.behaviour_loss(prior, e, a, 0 * w) == 0


def test_eq13_no_action_is_cloned_across_an_episode_boundary(agent):
    batch = batch_of(agent.cfg)
    nll = lambda **changed: agent.update(batch | changed)["prior/behaviour_nll"]
    assert nll() != 0
    assert nll(valid=torch.zeros(4, 5)) == 0
    store = moto.Replay(40, 16, 2)                            # of one step each: all are boundaries
    for _ in range(20):
        store.add({"image": np.zeros((1, 16, 16, 3), np.uint8), "action": np.zeros((0, 2)),
                   "reward": np.zeros(0), "terminal": False})
    sampled = moto.sample_batch(agent.cfg, np.random.default_rng(0), store)
    assert agent.update(sampled)["prior/behaviour_nll"] == 0


def test_eq13_cloning_sees_shifted_images():
    nll = lambda shift: tiny_agent(shift=shift).update(batch_of(tiny()))["prior/behaviour_nll"]
    assert nll(3) != nll(0)


def test_eq14_actor_loss_and_its_limits():
    q, d = torch.randn(3, 6), torch.randn(6, 2)
    expected = -q.mean() / q.abs().mean() + 0.7 * (d ** 2).sum() / 12
    torch.testing.assert_close(moto.actor_loss(q, d, 0.7), expected)
    torch.testing.assert_close(moto.actor_loss(q, d, 0.0), -q.mean() / q.abs().mean())
    assert moto.actor_loss(0 * q, 0 * d, 0.7) == 0            # a critic that knows nothing yet


@pytest.mark.parametrize("scale", [0.1, 100.0])
def test_eq14_actor_loss_has_no_scale(scale):
    """Critics a hundred times as large give the same gradient: beta means the same at any
    reward."""
    w, start = torch.randn(3, 2), torch.randn(6, 2)

    def gradient(scale):
        d = start.clone().requires_grad_()
        q = scale * (1 + torch.einsum("ka,na->kn", w, d))
        return torch.autograd.grad(moto.actor_loss(q, d, 0.05), d)[0]
    torch.testing.assert_close(gradient(scale), gradient(1.0))


@pytest.mark.parametrize("beta", [0.0, 1e4])
def test_eq14_following_the_loss_raises_the_critics_value_or_ends_at_the_prior(beta):
    rates = dict(actor_lr=1e-2, model_lr=1e-12, critic_lr=1e-12)
    agent = online_agent(beta=beta, bound=0.15 if beta else 1.0, **rates)
    randomised(agent.actor, 0.05)
    randomised(agent.critic, 0.5)                             # with opinions
    metrics = [agent.update(practice_batch(agent.cfg)) for _ in range(40)]
    first, last = ({name: np.mean([row[name] for row in rows]) for name in rows[0]}
                   for rows in (metrics[:5], metrics[-5:]))
    if beta:
        assert last["actor/correction"] < 0.5 * first["actor/correction"]
    else:
        assert last["actor/value"] > first["actor/value"] + 0.01


def test_eq14_the_critics_are_asked_for_what_the_limits_of_an_action_leave():
    """Where b + c d would leave [-1, 1] the value has no slope in d, and no reward for a larger
    one."""
    agent = online_agent(bound=0.5)
    agent.ema_policy.prior.net[-1].bias.data[:2] = torch.tensor([9.0, 0.0])    # b = 1, about 0
    randomised(agent.critic)
    torch.nn.init.ones_(agent.actor.net[-1].bias)                              # d > 0
    loss, _ = agent.actor_terms(torch.rand(3, 4, 16), 1e-9)
    slope, = torch.autograd.grad(loss, agent.actor.net[-1].bias)
    assert abs(slope[0]) < 1e-7 < 1e-4 < abs(slope[1])


def test_eq14_the_logged_gradients_are_those_of_the_two_terms():
    agent = online_agent()
    randomised(agent.actor)
    e = torch.rand(4, 4, 16)
    _, metrics = agent.actor_terms(e, 0.3)
    d = agent.actor(e).detach().requires_grad_()
    q = agent.critic(e, d)
    for name, term in (("value", -q.mean() / q.abs().mean().detach()),
                       ("behaviour", 0.3 * (d ** 2).mean())):
        gradient, = torch.autograd.grad(term, d, retain_graph=True)
        torch.testing.assert_close(metrics[f"actor/{name}_gradient"], gradient.norm())
        assert gradient.norm() > 0
    assert all(map(torch.isfinite, metrics.values()))


def test_eq14_the_behaviour_weight_falls_with_the_number_of_online_episodes():
    """On one batch, with an actor that stands still."""
    agent, gradients = online_agent(actor_lr=1e-12), []
    randomised(agent.actor)
    for agent.episodes in (1, 2, 10):
        metrics = agent.update(practice_batch(agent.cfg))
        gradients.append(metrics["actor/behaviour_gradient"])
    np.testing.assert_allclose(gradients, gradients[0] / np.array([1, 2, 10]), rtol=1e-4)


@pytest.mark.parametrize("mean,std", [(0.0, 1.0), (1.5, 0.4), (-0.3, 2.0)])
def test_eq15_density_integrates_to_one_and_matches_the_sample(mean, std):
    double = dict(dtype=torch.float64)
    policy = moto.TanhNormal(torch.full((1,), mean, **double), torch.full((1,), std, **double))
    n = torch.linspace(mean - 9 * std, mean + 9 * std, 200_001, **double)
    a = torch.tanh(n.clamp(-17, 17))
    inside = a.abs() < 1
    density = policy.log_prob(a[inside][:, None]).exp()
    assert abs(torch.trapezoid(density, a[inside]) - 1) < 1e-3
    a, logp = policy.rsample(torch.tensor([0.7], **double))
    torch.testing.assert_close(policy.log_prob(a), logp)
    extreme = moto.TanhNormal(torch.zeros(1), torch.ones(1)).rsample(torch.tensor([40.0]))
    assert torch.isfinite(extreme[1])


def random_mdp(rng, X=6, A=3, blur=0.3):
    P = rng.dirichlet(np.ones(X) * 0.5, (X, A))
    P_hat = (1 - blur) * P + blur * rng.dirichlet(np.ones(X), (X, A))
    return P, P_hat, rng.random((X, A)), np.ones(X) / X


def test_eq16_bound_holds_when_u_bounds_the_error_and_can_fail_when_not():
    rng, gamma, broken = np.random.default_rng(0), 0.9, []
    for _ in range(30):
        P, P_hat, r, start = random_mdp(rng)
        alpha, best = gamma * r.max() / (1 - gamma), moto.tabular_optimum(P, r, gamma)
        bound = lambda u: moto.tabular_bound(P, P_hat, r, u, alpha, gamma, best, start)
        u = np.abs(P - P_hat).sum(-1)
        J, below, condition = bound(u)
        assert condition and J >= below - 1e-9
        J, below, condition = bound(0 * u)
        assert not condition
        broken.append(J < below - 1e-6)
    assert any(broken)                                        # without uncertainty it does not hold


def test_eq16_tabular_values_against_a_rollout():
    P, _, r, start = random_mdp(np.random.default_rng(1))
    pi, state, total = np.full((6, 3), 1 / 3), start.copy(), 0.0
    for t in range(400):
        total += 0.9 ** t * (state[:, None] * pi * r).sum()
        state = np.einsum("x,xa,xay->y", state, pi, P)
    assert abs(total - start @ moto.tabular_value(P, r, pi, 0.9)) < 1e-8


def test_equation_ids_are_the_same_everywhere():
    code, tests = (HERE / "moto.py").read_text(), Path(__file__).read_text()
    in_code = set(map(int, re.findall(r'^ *"""Eq (\d+)', code, re.M)))
    in_tests = set(map(int, re.findall(r"def test_eq(\d+)_", tests)))
    assert in_code == in_tests == set(range(1, 17))
    path = HERE / "moto_walkthrough.ipynb"
    if path.exists():
        text = "\n".join("".join(cell["source"]) for cell in read_json(path)["cells"]
                         if cell["cell_type"] == "markdown")
        assert set(map(int, re.findall(r"^#+ Eq (\d+)", text, re.M))) == in_code


# --------------------------------------------------------------------------------------------------
# The update
# --------------------------------------------------------------------------------------------------

def snapshot(agent):
    return {name: flat(module.parameters()) for name, module in agent.modules.items()}


@pytest.mark.parametrize("stage, expected, following", [
    (1, [("encoder", "prior")], ["ema_policy"]), (2, [("model",), ("critic",)], ["target"]),
    (3, [("model",), ("critic",), ("actor",)], ["target", "ema_policy"])])
def test_each_loss_reaches_and_moves_its_own_parameters_and_no_others(stage, expected, following):
    """In each step of an optimiser; a gradient elsewhere would be one that should have stopped."""
    agent = online_agent(imagined=0.5)
    agent.episodes = int(stage == 3)
    randomised(agent.actor)
    step, seen = agent.step, []

    def watched(loss, *names):
        before = snapshot(agent)
        for module in agent.modules.values():
            module.zero_grad()
        norms = step(loss, *names)
        after = snapshot(agent)
        reached = {n for n, module in agent.modules.items()
                   if any(p.grad is not None for p in module.parameters())}
        passed = {"critic"} if names == ("actor",) else set()     # on the way to the actor
        assert {n for n in before if not torch.equal(before[n], after[n])} == set(names)
        assert reached == {*names, *passed}
        assert all(norms[f"grad/{name}"] > 0 for name in names)
        seen.append(names)
        return norms
    agent.step, before = watched, snapshot(agent)
    agent.update((batch_of if stage == 1 else practice_batch)(agent.cfg))
    assert seen == expected
    moved = {n for n, values in snapshot(agent).items() if not torch.equal(values, before[n])}
    assert moved == {*itertools.chain(*expected), *following}


def test_an_update_leaves_its_batch_as_it_was(agent):
    batch = practice_batch(agent.cfg)
    kept = dict(batch)
    agent.update(batch)
    assert batch.keys() == kept.keys() and all(batch[name] is kept[name] for name in kept)


def test_the_actor_learns_online_after_some_failures_alone():
    agent, rows = tiny_agent(warmup=2), []
    at = [flat(agent.actor.parameters())]
    for agent.episodes, agent.failures in ((0, 2), (0, 3), (1, 0), (2, 1), (3, 2), (4, 2)):
        rows.append(agent.update(practice_batch(agent.cfg)))
        at.append(flat(agent.actor.parameters()))
    moved = [not torch.equal(before, after) for before, after in itertools.pairwise(at)]
    assert moved == ["actor/value" in row for row in rows] == [False] * 4 + [True] * 2
    assert all(math.isfinite(value) for row in rows for value in row.values())


def test_failures_are_online_episodes_without_success_also_after_a_stop(dots, tmp_path):
    """The actor's first update follows the failure that makes them enough, in a run in one piece
    and in one of two."""
    argv = dict(warmup=2, episode_steps=5, data=dots)          # too few steps to be there each time
    for name, parts in (("whole", [8]), ("parts", [5, 8])):
        for count in parts:
            assert moto.main(tiny_flags(**argv, logdir=tmp_path / name, online_episodes=count)) == 0
        rows, failures, expected, found = metrics_of(tmp_path / name), 0, [], []
        for row in rows:
            failures += row.get("episode/success") == 0.0
            if "critic/q" in row and row["updates"] > 12:
                expected.append(failures >= 2)
                found.append("actor/value" in row)
        assert found == expected and {True, False} <= set(expected), failures


@pytest.mark.parametrize("beta", [5.0, 0.0])
def test_a_fresh_agent_acts_as_its_behaviour_prior(beta):
    """The correction begins at exactly zero. Without a behaviour term that is the whole action."""
    agent, state, prior_state = tiny_agent(beta=beta, bound=0.15 if beta else 1.0), None, None
    policy = agent.ema_policy
    clone = moto.Policy(policy.cfg, policy.encoder, policy.prior)
    for image in batch_of(policy.cfg)["image"][0]:
        a, state = policy.act(image, state)
        b, prior_state = clone.act(image, prior_state)
        assert np.array_equal(a, b if beta else 0 * b) and b.any()


def test_without_a_behaviour_term_the_prior_is_never_read():
    """beta 0: another prior changes no action, no imagined step, and no loss of the critics."""
    def results(prior_scale, beta):
        agent = online_agent(beta=beta, bound=1.0)
        randomised(agent.actor)
        feat, batch = critic_batch(agent)
        agent.model.disagreement_mean.fill_(0.5)
        randomised(agent.ema_policy.prior, prior_scale)
        a, _ = agent.ema_policy.act(random_image())
        torch.manual_seed(0)
        return a.tolist(), agent.critic_terms(feat, batch)[0]
    assert results(0.0, 0.0) == results(1.0, 0.0)
    assert results(0.0, 0.1) != results(1.0, 0.1)


def test_a_variant_is_a_change_of_numbers():
    fields = {f.name for f in dataclasses.fields(moto.Config)}
    learners = {"bc": moto.BC, "iql": baselines.IQL, "cql": baselines.CQL, "sac": baselines.SAC}
    acting, critics = {"encoder", "ema_policy"}, {"critic", "target"}
    trained = {"bc": acting | {"prior"}, "iql": acting | critics | {"actor", "value"},
               "cql": acting | critics | {"actor", "log_tau"},
               "sac": acting | critics | {"actor", "log_tau"}}
    for name, changes in moto.VARIANTS.items():
        assert set(changes) <= fields
        agent = tiny_agent(variant=name)
        assert type(agent) is learners.get(name, moto.MOTO)
        before = snapshot(agent)
        agent.update(batch_of(agent.cfg))
        if agent.stages == 2:
            agent.update(practice_batch(agent.cfg))
        moved = {n for n, v in snapshot(agent).items() if not torch.equal(v, before[n])}
        assert moved == trained.get(name, acting | critics | {"prior", "model"}), name


def test_a_task_has_its_own_budget_between_preset_and_variant():
    """Tasks differ in protocol and budget, in nothing of the method."""
    build = lambda task, **given: moto.build_config(device="cpu", task=task, **given)
    protocol = {"action_repeat", "episode_steps", "demos", "offline_updates", "online_episodes",
                "updates_per_episode", "eval_every", "final_episodes"}
    assert all(set(own) <= protocol for tasks in moto.TASKS.values() for own in tasks.values())
    plain, hard = build("drawer-open"), build("assembly")
    differing = {name for name in protocol if getattr(hard, name) != getattr(plain, name)}
    assert differing == moto.HARD.keys()
    assert build("hammer", variant="bc").online_episodes == 0
    assert build("hammer", online_episodes=7).online_episodes == 7
    for preset in ("debug", "paper"):                         # these budgets are their own
        hammer, drawer = (build(task, preset=preset) for task in ("hammer", "drawer-open"))
        assert all(getattr(hammer, name) == getattr(drawer, name) for name in protocol)
    for preset in moto.PRESETS:                               # but the kitchen is one at any scale
        cfg = build("kitchen-mixed", preset=preset)
        assert (cfg.action_repeat, cfg.episode_steps, cfg.reward_head) == (1, 280, "normal")


def test_what_sets_a_variant_apart_changes_the_update_and_the_rest_is_one_method():
    """With the other variants' numbers put back by hand each is moto again, bit for bit; without,
    each moves everything differently that learns from rewards."""
    def after(variant="moto", **changes):
        numbers = {"alpha": 50.0} | moto.VARIANTS[variant] | changes
        agent = online_agent(variant=variant, **numbers)
        torch.manual_seed(1)
        for make in (batch_of, practice_batch, practice_batch):
            agent.update(make(agent.cfg))
        return snapshot(agent)
    defaults = {name: getattr(tiny(), name) for name in moto.VARIANTS["dreamerv2"]}
    whole = after()
    for name in ("no-unc", "no-mve", "no-bc", "no-bc-no-unc", "dreamerv2"):
        mine, restored = after(name), after(name, **defaults | {"alpha": 50.0})
        equal = {n for n in whole if torch.equal(mine[n], whole[n])}
        draws = name == "dreamerv2"                           # others, in another horizon
        assert equal == {"encoder", "prior", *["model"] * (not draws)}, name
        assert all(torch.equal(restored[n], whole[n]) for n in whole), name


def test_replacing_a_function_of_the_module_changes_the_agent(monkeypatch):
    def actor_after(agent):
        agent.update(practice_batch(agent.cfg))
        return snapshot(agent)["actor"]
    agent, twin, original = online_agent(), online_agent(), moto.actor_loss
    before = actor_after(agent)
    monkeypatch.setattr(moto, "actor_loss", lambda q, *rest: original(-q, *rest))
    assert not torch.equal(before, actor_after(twin))


def test_ema_policy_follows_the_trained_weights():
    """Encoder and prior first, then the actor; the first weights are taken whole."""
    agent, image = online_agent(), random_image()
    followed = [("encoder", "prior")] * 3 + [("actor",)] * 2
    for count, names in enumerate(followed):
        old, rate = copy.deepcopy(agent.ema_policy), 10 / (10 + count)
        agent.update((practice_batch if "actor" in names else batch_of)(agent.cfg))
        for name in names:
            modules = getattr(old, name), getattr(agent.ema_policy, name), agent.modules[name]
            for before, after, fast in zip(*(module.parameters() for module in modules)):
                torch.testing.assert_close(after, (1 - rate) * before + rate * fast)
    assert agent.ema_policy.updates == 5
    before, _ = agent.ema_policy.act(image)
    for name in ("encoder", "prior", "actor"):
        randomised(agent.modules[name])                       # not the ones that act
    assert np.array_equal(agent.ema_policy.act(image)[0], before) and np.abs(before).sum() > 0


def after_updates(cfg, compiled=False, count=3):
    """Metrics of some updates, the first of the prior, and by how much the model's weights moved:
    from one set of weights, on the same batches, with one stream of random numbers."""
    agent = moto.MOTO(cfg, 2, True, "cpu", compiled)
    agent.episodes = 1
    start = flat(agent.modules["model"].parameters())
    torch.manual_seed(5)
    batch = practice_batch(cfg, T=cfg.length)
    metrics = [agent.update(batch_of(cfg))] + [agent.update(batch) for _ in range(count)]
    return metrics, flat(agent.modules["model"].parameters()) - start


@pytest.mark.parametrize("precision,compiled,tolerance", [
    ("bfloat16", False, 0.03), ("float32", True, 1e-4), ("bfloat16", True, 0.03)])
def test_the_fast_forms_agree_with_the_plain_one(precision, compiled, tolerance):
    """bfloat16 and torch.compile against float32, eager: every metric of three updates, and their
    sum in the weights. Tolerances are relative (for metrics near zero: to 0.1); float32 differs by
    rounding, bfloat16 keeps 8 bits."""
    import torch._inductor
    sizes = dict(hidden=32, deter=32, horizon=1, hold=1, length=4,       # compiling unrolls steps
                 warmup=0, critic_lr=3e-4)
    plain, step = after_updates(tiny(precision="float32", **sizes))
    with torch._inductor.config.patch(fallback_random=True):  # the same random numbers as eager
        fast, fast_step = after_updates(tiny(precision=precision, **sizes), compiled)
    for ours, theirs in zip(fast, plain):
        for name in theirs:
            assert abs(ours[name] - theirs[name]) <= tolerance * max(0.1, abs(theirs[name])), name
    cosine = torch.cosine_similarity(fast_step, step, dim=0)  # Adam makes whole steps of tiny ones
    assert cosine > (0.999 if precision == "float32" else 0.9)


def test_training_is_deterministic():
    def train():
        agent = online_agent()
        for i, make in enumerate((batch_of, practice_batch, practice_batch)):
            agent.update(make(agent.cfg, seed=i))
        return snapshot(agent)
    a, b = train(), train()
    assert all(torch.equal(a[n], b[n]) for n in a)


# --------------------------------------------------------------------------------------------------
# Data
# --------------------------------------------------------------------------------------------------

class Echo:
    """The image shows the action that led into it, and the reward is its first number: an
    off-by-one cannot hide."""
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


def test_evaluations_act_by_means(agent):
    kept = moto.evaluate(agent.cfg, RolloutWorkers(agent.cfg, Echo(False)), agent, 2)[1]
    one, two = (np.array(episode["action"]) for episode in kept)
    np.testing.assert_array_equal(one, two)
    np.testing.assert_array_equal(one[0], agent.ema_policy.act(kept[0]["image"][0])[0])


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("hold", [1, 3])
def test_acting_holds_each_decision_for_k_steps_and_stays_near_the_prior(sampled, hold):
    """The prior is read at every step, the actor at every k-th; noise is drawn for each decision
    alone, in units of the bound."""
    policy, state = tiny_agent(hold=hold, length=6, bound=0.2, noise=0.8).ema_policy, None
    randomised(policy.actor)
    noise, twin = (torch.Generator().manual_seed(7) for _ in range(2))
    images, seen = batch_of(policy.cfg, T=8, B=1)["image"][0], []
    for t, image in enumerate(images):
        a, state = policy.act(image.numpy(), state, noise if sampled else None)
        stack = [images[max(t - n, 0)] for n in (2, 1, 0)]
        e = policy.encoder(moto.to_image(torch.cat(stack, -1))[None])
        if t % hold == 0:
            d = policy.actor(e)
            assert d.abs().max() <= 1
            if sampled:
                d = (d + 0.8 * torch.randn(1, 2, generator=twin)).clamp(-1, 1)
            seen.append(d)
        b = policy.prior(e).mode
        np.testing.assert_allclose(a, (b + 0.2 * d).clamp(-1, 1)[0], atol=1e-6)
        assert np.abs(a - b[0].numpy()).max() <= 0.2 + 1e-6
    assert len(torch.cat(seen).unique(dim=0)) == math.ceil(8 / hold)


def test_the_behaviour_prior_alone_samples_each_action():
    policy, state = tiny_agent(variant="bc").ema_policy, None
    noise, twin = (torch.Generator().manual_seed(7) for _ in range(2))
    e = policy.encoder(moto.to_image(torch.as_tensor(random_image())).repeat(3, 1, 1)[None])
    for _ in range(3):
        a, state = policy.act(random_image(), state, noise)
        expected, _ = policy.prior(e).rsample(torch.randn(1, 2, generator=twin))
        np.testing.assert_allclose(a, expected[0], atol=1e-6)


@pytest.mark.parametrize("name", ["drawer-open", "kitchen-partial"])
def test_a_published_agent_opens_with_the_settings_it_was_made_with(name, monkeypatch):
    """Whatever its task's preset sets today."""
    monkeypatch.setattr(moto, "Run", lambda cfg, acting: cfg)
    folder = HERE / "experiments/agents" / name
    config = read_json(folder / "config.json")["config"]
    opened = dataclasses.asdict(moto.open_run(folder))
    assert moto.differences(config, opened, {"logdir", "device", "workers"}) == {}
    agent = torch.load(folder / "agent.pt", map_location="cpu", weights_only=True)
    assert agent["updates"] == read_json(folder / "result.json")["updates"]
    size = agent["modules"]["model"]["mix.0.weight"].shape[1] - opened["stoch"]
    learner = moto.make_agent(moto.build_config(**config | {"device": "cpu"}), size, False, "cpu")
    learner.load_acting(agent["modules"])                 # raises where the weights do not fit


@pytest.mark.parametrize("ends", [True, False])
def test_the_return_of_an_evaluation_is_comparable_with_the_value_estimate(agent, ends):
    """Up to a time limit, and as if the last reward went on for ever: after a terminal there is
    nothing."""
    workers = RolloutWorkers(agent.cfg, Echo(ends))
    result, (episode,) = moto.evaluate(agent.cfg, workers, agent, 1)
    gamma, rewards = agent.cfg.gamma, np.array(episode["reward"], float)
    on = np.append(rewards, np.full(2000, 0 if ends else rewards[-1]))
    discounted = lambda r: (1 - gamma) * (gamma ** np.arange(len(r)) @ r)
    np.testing.assert_allclose(result["return"], discounted(rewards), atol=1e-6)
    np.testing.assert_allclose(result["infinite_horizon_return"], discounted(on), atol=1e-6)


@pytest.mark.parametrize("ends", [True, False])
def test_action_image_reward_alignment_and_time_limits(agent, tmp_path, ends):
    cfg, store = agent.cfg, moto.Replay(40, 16, 2)
    for i in range(3):
        episode = moto.rollout(cfg, Echo(ends), agent.ema_policy, i, sample=True)
        assert len(episode["action"]) == 5
        assert episode.pop("success") is True                 # once is enough
        moto.save_episode(tmp_path / f"{i}.npz", **episode)
        store.add(moto.load_episode(tmp_path / f"{i}.npz", 16, 2))
    held = {name: values[:18] for name, values in store.data.items()}
    assert store.size == 18
    assert store.data["is_first"].nonzero().flatten().tolist() == [0, 6, 12]
    batch = store.sample(np.random.default_rng(0), 50, 7)
    np.testing.assert_allclose(batch["a"][..., 0], batch["r"])
    np.testing.assert_array_equal(batch["valid"], ~batch["is_first"][:, 1:])
    assert 0 < batch["valid"].mean() < 1
    shown = np.round((batch["a"][..., 0].numpy().astype(float) + 1) * 100)
    np.testing.assert_array_equal(batch["image"][..., 0, 0, 0], shown)
    terminals = held["is_terminal"].nonzero().flatten().tolist()
    assert terminals == ([5, 11, 17] if ends else [])
    boundary = held["is_first"]
    assert not held["r"][boundary].any() and not held["a"][boundary].any()


def test_replay_is_uniform_over_positions_and_mixes_as_told():
    store, rng = moto.Replay(90, 16, 1), np.random.default_rng(0)

    def add(n, part):
        offline = part == "offline"                           # its images are 1, the others 0
        store.add({"image": np.full((n, 16, 16, 3), offline, np.uint8),
                   "action": np.linspace(0, 1, n - 1)[:, None], "reward": np.arange(n - 1),
                   "terminal": False}, part)

    def counts(*part):
        batch = store.sample(rng, 20_000, 5, *part)           # each part is one long episode
        assert not batch["is_first"][:, 1:].any()
        return np.unique(batch["r"][:, 1], return_counts=True)[1]
    cfg = tiny(batch=8, offline_fraction=0.25)
    from_offline = lambda batch: batch["image"][:, 0, 0, 0, 0].bool()
    add(30, "offline")
    assert from_offline(moto.sample_batch(cfg, rng, store)).sum() == 8
    found = counts()
    assert len(found) == 26
    assert found.min() > 0.8 * found.mean() and found.max() < 1.2 * found.mean()
    add(60, "online")
    assert from_offline(moto.sample_batch(cfg, rng, store)).sum() == 2
    found = counts("online")
    assert len(found) == 56 and found.min() > 0.7 * found.mean()
    images = store.data["image"]
    assert images.dtype == torch.uint8 and len(images) == 90  # held once


def test_a_replay_keeps_features_and_then_batches_have_decisions():
    """Each episode is encoded by itself and once; decisions are short, many, and without images."""
    cfg, policy, rng = tiny(hold=2, batch=4), tiny_agent().ema_policy, np.random.default_rng(0)
    store = moto.Replay(60, 16, 2)

    def add(n, part):
        images = np.random.default_rng(n).integers(0, 255, (n, 16, 16, 3), dtype=np.uint8)
        store.add({"image": images, "action": np.zeros((n - 1, 2)), "reward": np.arange(n - 1),
                   "terminal": False}, part)
        return images
    first, second = add(9, "offline"), add(12, "online")
    assert "decisions" not in moto.sample_batch(cfg, rng, store)
    store.encode(policy)
    torch.testing.assert_close(store.data["e"][:9], policy.encode(first))
    torch.testing.assert_close(store.data["e"][9:21], policy.encode(second))
    before, third = store.data["e"][:21].clone(), add(15, "online")
    randomised(policy.encoder)                                # what is there stays as it is
    store.encode(policy)
    assert torch.equal(store.data["e"][:21], before)
    torch.testing.assert_close(store.data["e"][21:36], policy.encode(third))

    batch = moto.sample_batch(cfg, rng, store)
    decisions = batch.pop("decisions")
    assert batch["e"].shape == (4, 4, 16) and batch["image"].shape[:2] == (4, 4)   # T' of T = 6
    assert "image" not in decisions and decisions["e"].shape == (moto.DECISIONS * 4, 6, 16)
    old = (decisions["e"][:, :1] == before[:9]).all(-1).any(-1)
    assert old.sum() == moto.DECISIONS * 2                    # half of them demonstrations


@pytest.mark.parametrize("variant", ["moto", "iql"])
def test_a_run_gives_moto_decisions_after_the_first_stage(variant, dots, tmp_path, monkeypatch):
    """And tells it how many online episodes there were."""
    run = moto.Run(tiny(variant=variant, data=str(dots), logdir=str(tmp_path)))
    kinds, counts = [], []
    update = run.agent.update

    def watched(batch):
        kinds.append("decisions" in batch)
        counts.append(run.agent.episodes)
        return update(batch)
    monkeypatch.setattr(run.agent, "update", watched)
    run.open_data()
    moto.pretrain(run)
    moto.finetune(run)
    run.close()
    assert kinds == ([False] * 6 + [True] * 14 if variant == "moto" else [False] * 14)
    assert counts == [0] * (len(kinds) - 8) + [1] * 4 + [2] * 4
    if variant == "moto":
        assert run.replay.encoded == run.replay.size          # the newest episode, too


def test_the_model_learns_from_sequences_and_critics_and_actor_from_decisions():
    """Of longer decisions the last k + 1 steps count; what comes before is filtered only."""
    def after(batch_reward=0.0, decision_reward=0.0, feature=0.0, early_reward=0.0):
        agent = online_agent(horizon=0)
        randomised(agent.actor)
        torch.manual_seed(3)
        batch = practice_batch(agent.cfg)
        decisions = batch["decisions"]
        batch["e"] += feature
        batch["r"] += batch_reward
        decisions["r"][:, 4:] += decision_reward              # k = 2: arriving at the last two
        decisions["r"][:, :4] += early_reward
        metrics = agent.update(batch)
        return snapshot(agent), metrics
    plain, metrics = after()
    equal = lambda other: {name for name in plain if torch.equal(plain[name], other[0][name])}
    by_reward, by_feature, by_decision = after(0.5), after(feature=0.3), after(0.0, 0.5)
    assert equal(after(early_reward=0.5)) == {*plain}
    assert equal(by_reward) == equal(by_feature) == {*plain} - {"model"}
    assert by_feature[1]["model/feature"] != metrics["model/feature"]
    assert {"critic", "target", "actor"}.isdisjoint(equal(by_decision))
    assert {"model", "encoder", "prior"} <= equal(by_decision)


def test_gym_actions_are_mapped_to_the_box_and_seeds_fix_the_episode():
    env = moto.make_env(tiny())
    first = env.reset([1, 2, 3])
    p = env.env.unwrapped.p.copy()
    env.step(np.array([1.0, -0.5]))
    np.testing.assert_allclose(env.env.unwrapped.p - p, [0.2, -0.1], atol=1e-6)
    assert np.array_equal(first, env.reset([1, 2, 3]))
    assert not np.array_equal(first, env.reset([1, 2, 4]))
    assert first.shape == (16, 16, 3) and first.dtype == np.uint8


def test_a_terminal_task_learns_its_continuation(tmp_path):
    dot_episodes(tmp_path, 4, speed=1.0, noise=0.1, task="gym:test/DotEnds-v0")
    episodes = [moto.load_episode(p, 16, 2) for p in sorted(tmp_path.glob("*.npz"))]
    assert all(e["terminal"] and e["reward"][-1] == 1 for e in episodes)
    store = moto.Replay(200, 16, 2)
    for e in episodes:
        store.add(e)
    agent = tiny_agent(task="gym:test/DotEnds-v0", model_lr=3e-3, actor_lr=1e-3, channels=8,
                       hidden=32, deter=32, batch=8, length=7)
    rng = np.random.default_rng(0)
    learn = lambda: [agent.update(moto.sample_batch(agent.cfg, rng, store)) for _ in range(300)]
    learn()
    store.encode(agent.ema_policy)
    losses = [metrics["model/continuation"] for metrics in learn()]
    assert np.mean(losses[-30:]) < 0.3 * np.mean(losses[:30])


# --------------------------------------------------------------------------------------------------
# Stacked frames and shifts
# --------------------------------------------------------------------------------------------------

def test_frames_are_stacked_within_an_episode():
    image = torch.arange(2 * 7, dtype=torch.uint8).reshape(2, 7, 1, 1, 1)
    image = image.expand(2, 7, 4, 4, 3).contiguous()
    first = torch.zeros(2, 7, dtype=torch.bool)
    first[:, 0] = first[0, 3] = first[1, 5] = first[1, 6] = True
    got = moto.stacked(image, first)
    assert got.shape == (2, 5, 4, 4, 9)
    for b, t in itertools.product(range(2), range(2, 7)):     # the first step in view is not one
        begins = max([s for s in range(1, t + 1) if first[b, s]], default=0)
        expected = [int(image[b, max(t - n, begins), 0, 0, 0]) for n in (2, 1, 0)]
        assert got[b, t - 2, 0, 0, ::3].tolist() == expected


@pytest.mark.parametrize("variant", ["bc", "moto"])
def test_acting_stacks_the_frames_as_training_does(variant):
    agent = tiny_agent(False, variant=variant, hold=1)
    policy, state = agent.ema_policy, None
    image = torch.randint(0, 255, (5, 16, 16, 3), dtype=torch.uint8)
    padded = torch.cat([image[:1], image[:1], image])[None]                    # as at a reset
    batch = {"image": padded, "is_first": torch.zeros(1, 7, dtype=torch.bool),
             "a": torch.zeros(1, 7, 2)}
    e = agent.encode_frames(batch)[0][0].detach()
    torch.testing.assert_close(policy.encode(image), e)
    for t in range(5):
        a, state = policy.act(image[t].numpy(), state)
        np.testing.assert_allclose(a, policy.prior(e[t]).mode, atol=1e-5)


def test_features_are_those_of_the_steps_with_a_whole_stack(agent):
    """e and every other part of the batch are aligned; each stack is shifted by itself."""
    batch = batch_of(agent.cfg)
    e, later = agent.encode_frames(batch)
    assert e.shape == (4, 4, 16)
    assert all(torch.equal(later[name], value[:, 2:]) for name, value in batch.items())
    for t in range(2, 6):
        stack = torch.cat([batch["image"][:, t - n] for n in (2, 1, 0)], -1)
        torch.testing.assert_close(e[:, t - 2], agent.encoder(moto.to_image(stack)))
    still = {**batch, "image": batch["image"][:1, :1].expand(4, 6, 16, 16, 3)}
    different = lambda: agent.encode_frames(still)[0].flatten(0, 1).unique(dim=0)
    assert len(different()) == 1
    agent.cfg = dataclasses.replace(agent.cfg, shift=3)
    assert len(different()) > 8


def test_random_shifts_move_each_image_as_a_whole():
    torch.manual_seed(0)
    image = torch.randint(0, 255, (40, 16, 16, 9), dtype=torch.uint8)
    moved = moto.random_shift(image, 2)
    assert moved.shape == image.shape
    padded = torch.nn.functional.pad(image.movedim(-1, 1).float(), (2,) * 4, mode="replicate")
    padded, found = padded.byte().movedim(1, -1), set()
    for n in range(40):
        where = [(i, j) for i, j in itertools.product(range(5), range(5))
                 if torch.equal(padded[n, i:i + 16, j:j + 16], moved[n])]
        assert len(where) == 1
        found.add(where[0])
    assert len(found) > 15 and torch.equal(moto.random_shift(image, 0), image)


# --------------------------------------------------------------------------------------------------
# The baselines
# --------------------------------------------------------------------------------------------------

def baseline(variant, **changes):
    """A learner of tiny size, features, and a batch to match them, with one boundary between two
    episodes."""
    agent, g = tiny_agent(variant=variant, **changes), torch.Generator().manual_seed(1)
    terminal = (torch.rand(4, 6, generator=g) < 0.2).float()
    batch = batch_of(agent.cfg) | {"terminal": terminal}
    batch["valid"][1, 2] = 0
    return agent, torch.randn(4, 6, 16, generator=g), batch


def one_by_one(batch):
    """(b, t) of the transitions s_t, a_{t+1}, r_{t+1}, s_{t+1} inside an episode."""
    return [(b, t) for b in range(4) for t in range(5) if batch["valid"][b, t]]


def check_gradients(agent, loss, parts):
    """Each of the named modules learns from its own part of the loss alone."""
    for name, part in parts.items():
        p = next(agent.modules[name].parameters())
        whole, own = (torch.autograd.grad(l, p, retain_graph=True)[0] for l in (loss, part))
        torch.testing.assert_close(whole, own, rtol=1e-3, atol=1e-6)


def test_bc_against_an_oracle():
    agent, feat, batch = baseline("bc")
    loss, _ = agent.losses(feat, batch)
    terms = [tanh_normal(agent.prior(feat[b, t])).log_prob(batch["a"][b, t + 1]).sum()
             for b, t in one_by_one(batch)]
    torch.testing.assert_close(loss, -torch.stack(terms).mean(), rtol=1e-4, atol=1e-4)


def test_expectile_loss_is_asymmetric_and_finds_the_expectile():
    x, one = torch.tensor([2.0, -1.0, 3.0]), torch.ones(3)
    half = baselines.expectile_loss(x, 0.5, one)
    torch.testing.assert_close(half, 0.5 * x.square().mean())
    high = baselines.expectile_loss(x, 0.9, one)
    torch.testing.assert_close(high, (0.9 * 4 + 0.1 * 1 + 0.9 * 9) / torch.tensor(3.0))
    v = torch.zeros((), requires_grad=True)                   # of {0, 1} at tau = 0.9: v = 0.9
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
        goes_on = 1 - batch["is_terminal"][b, t + 1]
        y = batch["r"][b, t + 1] + 0.9 * goes_on * V_next.detach()
        critic.append((((agent.critic(s[None], a[None]) - y) / unit) ** 2).sum())
        weight = min(math.exp(3.0 * float(q - V)), 100)
        actor.append(-(weight * agent.actor(s).log_prob(a)))
    parts = {"value": value, "critic": critic, "actor": actor}
    parts = {name: torch.stack(terms).mean() for name, terms in parts.items()}
    loss, metrics = agent.losses(feat, batch)
    torch.testing.assert_close(loss, sum(parts.values()), rtol=1e-4, atol=1e-5)
    check_gradients(agent, loss, parts)


def test_cql_integral_against_quadrature(monkeypatch):
    agent, feat, _ = baseline("cql")
    q = lambda s, a: torch.stack([2 * a.sum(-1), -a.square().sum(-1)])
    monkeypatch.setattr(agent, "critic", q)
    monkeypatch.setattr(baselines.CQL, "samples", 20_000)
    torch.manual_seed(0)
    policy = agent.actor(feat[:1, :2])
    x = torch.linspace(-1, 1, 2001)                           # two actions: a square
    exact = [2 * torch.trapezoid(f.exp(), x).log() for f in (2 * x, -x.square())]
    got = agent.integral(feat[:1, :2], policy)
    assert got.shape == (2, 1, 1)
    torch.testing.assert_close(got.flatten(), torch.stack(exact), rtol=0.03, atol=0.03)


@pytest.mark.parametrize("variant", ["sac", "cql"])
def test_sac_and_cql_against_an_oracle(variant, monkeypatch):
    """With the policy made deterministic its one sample is its mode, and every term can be computed
    by hand."""
    agent, feat, batch = baseline(variant, gamma=0.9)
    assert agent.cql_weight == {"sac": 0.0, "cql": 5.0}[variant]
    monkeypatch.setattr(torch, "randn_like", torch.zeros_like)
    integral = torch.rand(2, 4, 5)
    monkeypatch.setattr(agent, "integral", lambda *_: integral)
    with torch.no_grad():
        agent.log_tau[0].fill_(math.log(0.3))
        for p in agent.target.parameters():
            p.add_(0.02)

    def mode(s):
        policy = agent.actor(s)
        return policy.mode, policy.log_density_at(policy.mean)
    critic, gap, q_at_mode, logp = [], [], [], []
    for b, t in one_by_one(batch):
        s, s_next, a = feat[b, t][None], feat[b, t + 1][None], batch["a"][b, t + 1][None]
        a_next, logp_next = mode(s_next)
        V_next = agent.target(s_next, a_next).min() - 0.3 * logp_next
        y = batch["r"][b, t + 1] + 0.9 * (1 - batch["is_terminal"][b, t + 1]) * V_next
        q = agent.critic(s, a)
        critic.append((((q - y.detach()) / 10) ** 2).sum())
        gap.append((integral[:, b, t] - q.squeeze()).sum() / 100)
    for s in feat.flatten(0, 1):
        a, density = mode(s[None])
        q_at_mode.append(agent.critic(s[None], a).min())
        logp.append(density)
    logp, log_tau = torch.cat(logp), agent.log_tau[0]
    parts = {"critic": torch.stack(critic).mean() + agent.cql_weight * torch.stack(gap).mean(),
             "actor": (0.3 * logp - torch.stack(q_at_mode)).mean() / 10,
             "log_tau": -log_tau * (logp.detach() - 2).mean()}
    loss, _ = agent.losses(feat, batch)
    torch.testing.assert_close(loss, sum(parts.values()), rtol=1e-4, atol=1e-4)
    check_gradients(agent, loss, parts)
    feat.requires_grad_()                                     # the actor's loss stops before it
    loss, _ = agent.losses(feat, batch)
    grad, = torch.autograd.grad(loss, feat)
    assert not grad[:, -1].any() and grad[:, :-1].any()


def test_cql_prefers_the_actions_of_the_data():
    def gap(variant, updates, **changes):
        agent = tiny_agent(False, variant=variant, shift=0, **changes)
        batch = batch_of(agent.cfg)
        for _ in range(updates):
            metrics = agent.update(batch)
        return metrics["critic/gap"]
    assert gap("cql", 150, critic_lr=3e-3) < gap("cql", 1) - 1
    assert gap("sac", 150, critic_lr=3e-3) == 0


def stopping_at(count, number, update):
    """A patch of an agent's `update` in whose call of that count the process gets a signal."""
    calls = itertools.count(1)

    def stopping(self, batch):
        if next(calls) == count:
            os.kill(os.getpid(), number)
        return update(self, batch)
    return stopping


@pytest.mark.parametrize("variant", ["iql", "cql"])
def test_a_baseline_that_was_stopped_resumes_bit_for_bit(dots, tmp_path, monkeypatch, variant):
    learner = moto.AGENTS[variant]
    assert run(dots, tmp_path / "whole", variant=variant) == 0
    with monkeypatch.context() as patch:                      # inside an episode's updates
        patch.setattr(learner, "update", stopping_at(8, signal.SIGTERM, learner.update))
        assert run(dots, tmp_path / "parts", variant=variant, save_every=100) == 143
    assert run(dots, tmp_path / "parts", variant=variant, save_every=100) == 0
    assert same_weights(tmp_path / "whole", tmp_path / "parts")


def test_the_command_of_the_baselines_with_rollout_workers(dots, tmp_path, capsys):
    """Every process knows the class: the sweep's, and those in which its run plays episodes."""
    sweep = [*sweep_flags(dots, tmp_path, workers=2, online_episodes=1), "--tasks", DOT,
             "--variants", "iql", "bc"]
    iql, bc = (tmp_path / dot_run(variant) for variant in ("iql", "bc"))
    source = HERE / "experiments/baselines.py"
    for program, argv in (("reproduce.py", sweep),
                          ("baselines.py", ["--evaluate", iql, "--episodes", 2])):
        command = [sys.executable, source.with_name(program), *map(str, argv)]
        result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True,
                                env=os.environ | {"OMP_NUM_THREADS": "1"})
        assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["variant"] == "iql"
    assert (iql / source.name).read_bytes() == source.read_bytes()     # the program of its agent
    assert (bc / "moto.py").exists()
    assert reproduce.main(sweep) == 0
    assert "2 finished before, 0 to do" in capsys.readouterr().out


def test_moto_alone_names_the_program_of_the_baselines(capsys, monkeypatch, tmp_path):
    assert set(moto.BASELINES) == moto.AGENTS.keys() - {"bc"}
    for name in moto.BASELINES:
        config = {"config": dataclasses.asdict(tiny(variant=name))}
        (tmp_path / "config.json").write_text(json.dumps(config))
        others = {variant: own for variant, own in moto.VARIANTS.items() if variant != name}
        monkeypatch.setattr(moto, "VARIANTS", others)         # their order stays
        for argv in (["--variant", name], ["--evaluate", tmp_path]):
            one_sentence(capsys, argv, name, "python experiments/baselines.py")


# --------------------------------------------------------------------------------------------------
# Runs and resuming
# --------------------------------------------------------------------------------------------------

def leaves(state):
    """The values in nested dicts and lists."""
    if not isinstance(state, (dict, list)):
        return [state]
    parts = state.values() if isinstance(state, dict) else state
    return [value for part in parts for value in leaves(part)]


def checkpoint_of(logdir):
    return torch.load(logdir / "checkpoint.pt", weights_only=True)


def weights(logdir):
    return leaves(checkpoint_of(logdir)["agent"])


def same(a, b):
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


def same_weights(logdir, other):
    a, b = weights(logdir), weights(other)
    return len(a) == len(b) and all(map(same, a, b))


def metrics_of(logdir, *without):
    """The rows of metrics.jsonl, without these columns."""
    return [{name: value for name, value in row.items() if name not in without}
            for row in moto.read_metrics(logdir / "metrics.jsonl")]


def run(dots, logdir, **changes):
    moto.stop_requested["signal"] = None
    return moto.main(tiny_flags(data=dots, logdir=logdir, **changes))


@pytest.fixture(scope="module")
def finished(dots, tmp_path_factory):
    logdir = tmp_path_factory.mktemp("whole")
    assert run(dots, logdir) == 0
    return logdir


def test_every_second_online_episode_has_no_noise(dots, tmp_path):
    """Before the actor learns, what is not noise is the prior's mean action."""
    assert run(dots, tmp_path, online_episodes=4, warmup=9, noise=0.5) == 0
    policy = moto.open_run(tmp_path).agent.ema_policy
    largest = []
    for index in range(4):
        episode, state = moto.load_episode(tmp_path / "episodes" / f"{index:05d}.npz", 16, 2), None
        largest.append(0)
        for image, action in zip(episode["image"], episode["action"]):
            a, state = policy.act(image, state)
            largest[-1] = max(largest[-1], abs(a - action).max())
    assert max(largest[1::2]) < 0.003 < 0.01 < min(largest[::2]), largest


def test_the_newest_ema_policy_collects_also_after_a_stop(dots, tmp_path, monkeypatch):
    """Episode k is collected with the weights after all updates so far; also after a stop in
    between."""
    true_rollout, true_update, collected = moto.rollout, moto.Run.update, []

    def watched(cfg, env, policy, seed, sample):
        if seed[1] == 1:                                      # the online stream
            collected.append((seed[2], float(policy.updates)))
        return true_rollout(cfg, env, policy, seed, sample)

    def stopping(self, bar, stage):
        if self.state["updates"] == 18:
            moto.stop_requested["signal"] = signal.SIGTERM
        true_update(self, bar, stage)
    expected = [(0, 6.0), (1, 10.0), (2, 14.0), (3, 18.0)]    # 6 of the prior, 4 per episode
    changes = dict(online_episodes=4, warmup=0)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    monkeypatch.setattr(moto, "rollout", watched)
    assert run(dots, whole, **changes) == 0
    assert collected == expected
    collected.clear()
    with monkeypatch.context() as patch:
        patch.setattr(moto.Run, "update", stopping)
        assert run(dots, parts, **changes) == 128 + signal.SIGTERM
    assert run(dots, parts, **changes) == 0
    assert collected == expected
    assert same_weights(whole, parts)


# In either stage offline, at their ends, inside an episode's updates, between two episodes
@pytest.mark.parametrize("stop_at", [3, 6, 9, 12, 14, 16])
def test_stop_and_resume_equals_never_stopping_bit_for_bit(
        finished, dots, tmp_path, monkeypatch, capsys, stop_at):
    number = signal.SIGTERM if stop_at % 2 else signal.SIGINT
    with monkeypatch.context() as patch:
        patch.setattr(moto.MOTO, "update", stopping_at(stop_at, number, moto.MOTO.update))
        assert run(dots, tmp_path, save_every=100) == 128 + number
    assert "repeat the command" in capsys.readouterr().err
    assert checkpoint_of(tmp_path)["state"]["updates"] == stop_at
    torch.manual_seed(999)
    assert run(dots, tmp_path, save_every=100) == 0
    assert same_weights(finished, tmp_path)
    updates = [row["updates"] for row in metrics_of(tmp_path) if "model/image" in row]
    assert updates == list(range(7, 21))


def test_a_run_of_no_updates_scores_and_draws_the_untrained_agent(dots, tmp_path):
    assert run(dots, tmp_path, offline_updates=0, online_episodes=0) == 0
    assert (tmp_path / "prediction.png").exists()
    assert read_json(tmp_path / "result.json")["updates"] == 0
    assert run(dots, tmp_path, offline_updates=0, online_episodes=1) == 0     # practice alone
    assert read_json(tmp_path / "result.json")["updates"] == 4


def test_a_run_is_scored_on_the_way_but_not_while_model_and_critics_learn_offline(dots, tmp_path):
    """These do so in updates 7 to 12."""
    assert run(dots, tmp_path, eval_every=2) == 0
    names = [row["evaluation"] for row in metrics_of(tmp_path) if "evaluation" in row]
    on_the_way = [f"update {n}" for n in (2, 4, 14, 16, 18)]
    assert names == [*on_the_way[:2], "offline", *on_the_way[2:], "final"]


def test_the_recorded_runs_have_a_score_before_practice_and_one_at_the_end():
    folders = sorted((HERE / "experiments/runs").glob("*-seed*"))
    assert folders
    for folder in folders:
        config, rows = reproduce.read_run(folder)
        assert rows[0]["evaluation"] in ("offline", "final")
        assert max(rows) == config["online_episodes"], folder


def test_what_a_run_leaves(finished):
    import imageio.v3 as imageio
    assert {"config.json", "metrics.jsonl", "result.json", "moto.py", "checkpoint.pt", "curve.png",
            "prediction.png", "eval.gif"} <= {path.name for path in finished.iterdir()}
    result = read_json(finished / "result.json")
    assert {"task", "variant", "seed", "preset", "offline_success", "final_success",
            "eval_episodes", "updates", "env_steps", "wall_seconds", "device"} <= result.keys()
    assert result["updates"] == 20 and result["env_steps"] == 24
    assert result["wall_seconds"]["total"] > 0
    assert (finished / "moto.py").read_bytes() == (HERE / "moto.py").read_bytes()
    config = read_json(finished / "config.json")
    assert torch.__version__.startswith(config["versions"]["torch"])
    assert config["config"]["horizon"] == 3
    gif = imageio.imread(finished / "eval.gif")      # two episodes above reconstructions, doubled
    assert gif.shape[1:] == (64, 64, 3)


def test_a_longer_budget_continues_a_finished_run_and_scores_it_again(
        finished, dots, tmp_path, capsys):
    folder = shutil.copytree(finished, tmp_path / "run")
    assert run(dots, folder, online_episodes=3, final_episodes=3) == 0
    result = read_json(folder / "result.json")
    assert result["updates"] == 24 and result["eval_episodes"] == 3
    scored = [r["updates"] for r in metrics_of(folder) if r.get("evaluation") == "final"]
    assert scored == [20, 24]
    before = (folder / "config.json").read_bytes()
    assert run(dots, folder, online_episodes=1, final_episodes=3) == 2
    assert "24 updates, more than" in capsys.readouterr().err
    assert (folder / "config.json").read_bytes() == before


def test_a_finished_run_repeated_changes_nothing(finished, dots):
    before = weights(finished)
    assert run(dots, finished) == 0
    assert all(map(same, before, weights(finished)))


def test_a_damaged_checkpoint_is_no_fresh_start(dots, tmp_path, capsys):
    assert run(dots, tmp_path, online_episodes=0) == 0
    newest = tmp_path / "checkpoint.pt"
    newest.write_bytes(newest.read_bytes()[:1000])
    for _ in range(2):                                        # cut short, then gone
        assert run(dots, tmp_path, online_episodes=0) == 2
        assert "cannot be continued" in capsys.readouterr().err
        newest.unlink(missing_ok=True)
    assert (tmp_path / "agent.pt").exists()


CHILD = f"""
import importlib.util, os, sys
s = importlib.util.spec_from_file_location("test_moto", {str(Path(__file__))!r})
t = importlib.util.module_from_spec(s)
s.loader.exec_module(t)
moto = t.moto
"""
MAIN = "sys.exit(moto.main(sys.argv[1:]))\n"


def child(code, *argv, **kwargs):
    """Run `code` in a fresh interpreter that has this moto and the toy task."""
    command = [sys.executable, "-c", CHILD + code, *map(str, argv)]
    return subprocess.run(command, capture_output=True, text=True, **kwargs)


def test_a_reader_never_sees_half_a_file(tmp_path):
    path, failing = tmp_path / "file", lambda file: (file.write(b"new"), 1 / 0)
    moto.write_atomically(path, lambda file: file.write(b"old"))
    with pytest.raises(ZeroDivisionError):
        moto.write_atomically(path, failing)
    assert path.read_bytes() == b"old"
    with open(path, "rb") as reader:
        moto.write_atomically(path, lambda file: file.write(b"new"))
        assert reader.read() == b"old" and path.read_bytes() == b"new"


DYING = {"half a file": """
import torch
save = torch.save
def dying(value, file):
    save(value, file)
    if value.get("state", {}).get("updates") == 4:
        file.truncate(500)
        os.kill(os.getpid(), 9)
torch.save = dying
""", "between the files": """
replace, update, seen = os.replace, moto.MOTO.update, []
def dying(source, target):
    replace(source, target)
    if "checkpoint" in str(target) and len(seen) > 3:
        os.kill(os.getpid(), 9)
def counted(self, batch):
    seen.append(1)
    return update(self, batch)
os.replace, moto.MOTO.update = dying, counted
"""}


@pytest.mark.parametrize("moment, kept", [("half a file", 3), ("between the files", 4)])
def test_kill_minus_nine_during_a_save_loses_one_save_at_most(dots, tmp_path, moment, kept):
    result = child(DYING[moment] + MAIN, *tiny_flags(data=dots, logdir=tmp_path))
    assert result.returncode == -9
    assert moto.Run(tiny(data=str(dots), logdir=str(tmp_path))).state["updates"] == kept
    assert run(dots, tmp_path) == 0


def evaluation(capsys, folder, episodes):
    """What `--evaluate` prints."""
    capsys.readouterr()
    assert moto.main(["--evaluate", str(folder), "--episodes", str(episodes)]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_the_command_that_evaluates_and_the_one_that_shows_runs(finished, capsys):
    score = evaluation(capsys, finished, 3)
    assert score["episodes"] == 3 and 0 <= score["success"] <= 1 and score["updates"] == 20
    assert reproduce.main([str(finished), str(finished)]) == 0      # it counts once
    for name in ("curves.png", "gap.png"):
        assert (finished.parent / name).stat().st_size > 5000
    last = capsys.readouterr().out.splitlines()[-1].split(" | ")
    result = read_json(finished / "result.json")
    assert last[2] == "0" and last[3] == f"{result['offline_success']:.0%}"
    assert last[4] == f"{result['final_success']:.0%}"


@pytest.mark.parametrize("panels", [1, 2, 7])
def test_the_legend_of_all_variants_fits_above_the_panels(panels):
    groups = {variant: [({}, {0: {}, 100: {}})] for variant in moto.VARIANTS}
    tasks = {f"task {n}": groups for n in range(panels)}
    figure = reproduce.draw_groups(tasks, "success", lambda row: 0.5)
    figure.draw_without_rendering()
    legend = figure.legends[0].get_window_extent()
    assert len(figure.legends[0].texts) == len(moto.VARIANTS)
    assert legend.x0 >= 0 and legend.x1 <= figure.bbox.width


def test_the_interval_covers_what_seeds_and_episodes_leave_open():
    def interval(n, *shares):                                 # of successes, one of each seed
        return reproduce.interval([{"evaluation/success": share, "evaluation/episodes": n}
                                   for share in shares])

    def kitchen(*counts):                                     # episodes with 0 to 4 objects
        return reproduce.interval([{
            "evaluation/success": counts[4] / 20, "evaluation/episodes": 20,
            "evaluation/counts": counts, "evaluation/completed": np.dot(range(5), counts) / 20}])
    low, high = interval(50, 0.5)                             # one binomial: 0.5 +- 1.96 * 0.0707
    assert 0.35 < low < 0.39 and 0.61 < high < 0.65
    low, high = kitchen(10, 0, 0, 0, 10)                      # all or nothing: 20 draws, not 80
    assert 0.27 < low < 0.33 and 0.67 < high < 0.73
    assert np.diff(kitchen(0, 0, 20, 0, 0)) < 0.13 and np.diff(kitchen(10, 0, 0, 0, 10)) > 0.37
    wide, narrow = np.diff(interval(50, 0.1, 0.9)), np.diff(interval(50, 0.5, 0.5))
    assert wide > 0.7 > 0.2 > narrow                          # seeds that differ widen it
    assert np.diff(interval(5000, 0.5)) < 0.03 and interval(50, 1.0)[0] > 0.93


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_what_acts_is_enough_to_evaluate_and_not_enough_to_continue(
        finished, dots, tmp_path, capsys):
    """A published agent is a copy of two files: it scores as its run does, and no command changes a
    folder that another one made."""
    small = tmp_path / "small"
    small.mkdir()
    for name in ("config.json", "agent.pt"):
        shutil.copy(finished / name, small)
    sizes = [path.stat().st_size for path in (small / "agent.pt", finished / "checkpoint.pt")]
    assert sizes[0] < 0.25 * sizes[1]
    before = content(finished)
    scores = [evaluation(capsys, folder, 6) for folder in (finished, small)]
    assert scores[0] == scores[1]
    assert math.isfinite(scores[0]["value_estimate"]) and scores[0]["episodes"] == 6
    after = content(finished)
    assert after.pop("evaluate.gif") and before.pop("evaluate.gif", True) and after == before
    config = read_json(finished / "config.json")["config"]
    before = content(small)
    one_sentence(capsys, flags(**(config | {"logdir": small})), "cannot be continued")
    assert content(small) | {".lock": b""} == before | {".lock": b""}
    part, whole = moto.open_run(small), moto.Run(moto.Config(**config)).agent
    for name in "ema_policy", "model", "target":
        module = whole.modules[name]
        published = part.agent.modules[name].state_dict()
        torch.testing.assert_close(published, module.state_dict(), rtol=1e-3, atol=1e-3)
    values = [a.value_estimate(random_image()) for a in (part.agent, whole)]
    assert values[0] == pytest.approx(values[1], rel=0.01, abs=0.003)
    assert part.state["updates"] == 20
    assert part.agent.ema_policy.updates == whole.ema_policy.updates > 6


def test_evaluating_a_run_that_is_still_training_leaves_its_metrics_alone(
        finished, tmp_path, capsys):
    live = shutil.copytree(finished, tmp_path / "live")
    with open(live / "metrics.jsonl", "a") as file:           # trained since the last checkpoint
        file.write(json.dumps({"updates": 99, "model/image": 1.0}) + "\n")
    written = (live / "metrics.jsonl").read_bytes()
    evaluation(capsys, live, 1)
    assert (live / "metrics.jsonl").read_bytes() == written


# --------------------------------------------------------------------------------------------------
# Many runs
# --------------------------------------------------------------------------------------------------

DOT = "gym:test_moto:test/Dot-v0"                             # which every process can import


def dot_run(variant, seed=0):
    return f"gym-test_moto-test-Dot-v0-{variant}-seed{seed}"


def sweep_flags(dots, root, **changes):
    values = TINY | {"data": dots, "logdir": root} | changes
    values.pop("task")
    return flags(**values)


def finish_times(root):
    return {path.parent.name: path.stat().st_mtime_ns for path in Path(root).glob("*/result.json")}


def rows_of(table):
    return [line.split(" | ")[:3] for line in table.splitlines() if line.startswith("| gym")]


def test_a_sweep_runs_all_reports_failures_and_skips_what_is_finished(
        dots, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", str(torch.get_num_threads()))       # sums depend on it
    argv = [*sweep_flags(dots, tmp_path), "--tasks", DOT, "gym:NoSuch-v0",
            "--variants", "moto", "no-unc", "--jobs", "2"]
    assert reproduce.main(argv) == 2
    out, err = capsys.readouterr()
    first, other = dot_run("moto"), dot_run("no-unc")
    assert set(finish_times(tmp_path)) == {first, other}
    assert "4 runs" in out and "2 of 4 runs failed" in err
    assert rows_of(out) == [[f"| {DOT}", variant, "0"] for variant in ("moto", "no-unc")]
    assert all((tmp_path / name).stat().st_size > 5000 for name in ("curves.png", "gap.png"))
    failed = "gym-NoSuch-v0-no-unc-seed0"
    assert failed in err and "NoSuch" in (tmp_path / failed / "log.txt").read_text()
    alone = tmp_path / "alone" / "no-unc"                     # each run is what its command makes
    assert moto.main(tiny_flags(task=DOT, data=dots, variant="no-unc", logdir=alone)) == 0
    assert same_weights(alone, tmp_path / other)
    before = finish_times(tmp_path)
    capsys.readouterr()
    mine = [word for word in argv if word != "gym:NoSuch-v0"]
    assert reproduce.main(mine) == 0
    assert finish_times(tmp_path) == before
    assert "2 finished before, 0 to do" in capsys.readouterr().out
    changed = tiny(task=DOT, data=str(dots), logdir=str(tmp_path / first), gamma=0.5)
    assert not reproduce.finished(changed)
    longer = [word for word in mine if word != "moto"] + ["--online-episodes", "3"]
    assert reproduce.main(longer) == 0                        # another budget: not finished
    after = finish_times(tmp_path)
    assert after[first] == before[first] and after[other] != before[other]
    assert rows_of(capsys.readouterr().out) == [[f"| {DOT}", "no-unc", "0"]]     # this command's


def test_flags_of_a_sweep_leave_a_variant_what_it_is(dots, tmp_path):
    variants = "no-bc", "no-unc", "bc"
    shared = dict(online_episodes=1, beta=0.2, alpha=0.4)
    argv = [*sweep_flags(dots, tmp_path, **shared), "--tasks", DOT, "--variants", *variants]
    assert reproduce.main(argv) == 0
    configs = [read_json(tmp_path / dot_run(v) / "config.json")["config"] for v in variants]
    assert [config["beta"] for config in configs] == [0, 0.2, 0.2]
    assert [config["alpha"] for config in configs] == [0.4, 0, 0.4]
    assert [config["online_episodes"] for config in configs] == [1, 1, 0]
    assert [config["bound"] for config in configs] == [1, 0.15, 0.15]


@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="follows processes as Linux does")
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_sweep_leaves_nothing_running_and_resumes(dots, tmp_path, capsys, how):
    """Two runs, one at a time. The sweep dies in the second, whose process saves and stops;
    repeated, only that one is continued."""
    import select
    argv = [*sweep_flags(dots, tmp_path, offline_updates=200, save_every=20, log_every=20),
            "--tasks", DOT, "--seeds", "0", "1"]
    process = subprocess.Popen(
        [sys.executable, HERE / "experiments/reproduce.py", *argv], stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    first, second = (tmp_path / dot_run("moto", seed) for seed in (0, 1))
    while not process.stdout.readline().startswith(f"{first.name}: success"):
        assert process.poll() is None
    while not (second / "checkpoint.pt").exists():            # 20 of its 408 updates are saved
        assert process.poll() is None
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    handles = [os.pidfd_open(int(pid)) for pid in children]
    process.send_signal(how)
    assert process.wait(60) == {signal.SIGKILL: -9, signal.SIGINT: 130}[how]
    for handle in handles:                                    # the run's process ends by itself
        assert select.select([handle], [], [], 60)[0]
    done = checkpoint_of(second)["state"]["updates"]
    assert 0 < done < 408 and not (second / "result.json").exists()
    before = finish_times(tmp_path)
    assert reproduce.main(argv) == 0
    assert "1 finished before, 1 to do" in capsys.readouterr().out
    assert f"from update {done} on" in (second / "log.txt").read_text()
    after = finish_times(tmp_path)
    assert after.keys() == {first.name, second.name}
    assert after[first.name] == before[first.name]


def test_a_sweep_through_submitit(dots, tmp_path, capsys):
    pytest.importorskip("submitit")
    argv = [*sweep_flags(dots, tmp_path, online_episodes=1), "--tasks", "gym:NoSuch-v0", DOT,
            "--variants", "iql", "--jobs", "2", "--executor", "local"]
    assert reproduce.main(argv) == 2
    assert list(finish_times(tmp_path)) == [dot_run("iql")]
    assert "NoSuch" in capsys.readouterr().err


def test_a_reader_that_stops_reading_is_no_error(tmp_path):
    """As in `python experiments/reproduce.py experiments/runs/*-seed* | head -3`."""
    name = "drawer-open-moto-seed3"
    folder = shutil.copytree(HERE / "experiments/runs" / name, tmp_path / name)
    process = subprocess.Popen(
        [sys.executable, HERE / "experiments/reproduce.py", folder], stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONUNBUFFERED": ""})
    process.stdout.close()                                    # before it has written anything
    errors = process.stderr.read()
    assert process.wait() == 0 and "Error" not in errors


def test_readmes_results_are_what_reproduce_prints_for_the_committed_runs(monkeypatch, capsys):
    monkeypatch.setattr(reproduce, "draw_groups", lambda *args, **kwargs: None)     # no curves
    folders = sorted((HERE / "experiments/runs").glob("*-seed*"))
    assert reproduce.main([str(folder) for folder in folders]) == 0
    section = (HERE / "README.md").read_text().split("\n## Results\n")[1].split("\n## ")[0]
    table = [line for line in section.splitlines() if line.startswith("|")]
    assert table == capsys.readouterr().out.splitlines()


def test_two_processes_do_not_train_in_one_folder(dots, tmp_path, capsys):
    fcntl = pytest.importorskip("fcntl")
    with open(tmp_path / ".lock", "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert run(dots, tmp_path) == 2
        assert "another process is training" in capsys.readouterr().err
    assert run(dots, tmp_path) == 0


# --------------------------------------------------------------------------------------------------
# Errors
# --------------------------------------------------------------------------------------------------

def test_importing_moto_has_no_side_effects_and_needs_no_simulator(tmp_path):
    code = f"""
import importlib.util, sys
for name in ("mujoco", "metaworld", "gymnasium", "imageio", "matplotlib"):
    sys.modules[name] = None
s = importlib.util.spec_from_file_location("moto", {str(HERE / 'moto.py')!r})
m = sys.modules["moto"] = importlib.util.module_from_spec(s)
s.loader.exec_module(m)
m.MOTO(m.build_config(preset="debug", device="cpu"), 4, False, "cpu")
"""
    env = {k: v for k, v in os.environ.items() if k != "MUJOCO_GL"}
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env,
                            capture_output=True, text=True)
    assert result.returncode == 0 and result.stdout == "", result.stderr
    assert not list(tmp_path.iterdir())


def one_sentence(capsys, argv, *words, program=moto):
    """The command fails with one sentence that has these words -> all that it wrote to stderr."""
    moto.stop_requested["signal"] = None
    assert program.main([str(word) for word in argv]) == 2
    err = capsys.readouterr().err
    message = [line for line in re.split(r"[\r\n]", err) if line.startswith("moto: ")]
    assert len(message) == 1 and "Traceback" not in err
    assert all(word in message[0] for word in words), message
    return err


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
    (["--length", "10"], ["--length", "at least 11", "--hold"]),
    (["--imagined", "0.5", "--lam", "0"], ["--imagined", "0 without", "--lam"]),
    (["--beta", "0"], ["--beta", "--bound at least 1"]),
    (["--episode-steps", "300"], ["--episode-steps", "at most 245"]),
    (["--evaluate", "/nowhere", "--episodes", "0"], ["--episodes", "at least 1"]),
    (["--device", "abacus"], ["abacus"]),
    (["--precision", "int8"], ["--precision"]),
    (["--data", "/nowhere/at/all"], ["no folder"]),
    (["--evaluate", "/nowhere"], ["run folder"]),
    (["--logdir", "/proc/none/x"], ["cannot write"]),
])
def test_bad_input_gets_one_sentence(capsys, tmp_path, argv, words):
    defaults = {"--logdir": tmp_path / "run", "--cache": tmp_path / "demos", "--preset": "debug",
                "--device": "cpu"}
    if argv[0] != "--evaluate":
        argv = argv + [word for flag, value in defaults.items() if flag not in argv
                       for word in (flag, value)]
    one_sentence(capsys, argv, *words)


@pytest.mark.parametrize("argv, words", [
    (["--variant", "bc"], "parts of MOTO"),
    (["--variant", "iql"], "parts of MOTO"),
    (["--gamma", "2"], "--gamma"),
    (["--evaluate", "x"], "--evaluate is for moto.py"),
])
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
    """A product in float32, timed first, takes 2 units of time here. (An x86 processor may list
    bfloat16 and be slower with it.)"""
    fastest = iter([2.0, short])
    monkeypatch.setattr(moto.timeit, "repeat", lambda *_, **__: [9.0, next(fastest), 9.0])
    moto.bfloat16_pays.cache_clear()
    assert moto.build_config(device="cpu").precision == chosen
    moto.bfloat16_pays.cache_clear()


def test_an_unknown_flag_exits_with_two():
    with pytest.raises(SystemExit) as stop:
        moto.main(["--horizn", "3"])
    assert stop.value.code == 2


def full(*shape, value=0, dtype=np.float32):
    return np.full(shape, value, dtype)


GOOD = dict(image=full(6, 16, 16, 3, dtype=np.uint8), action=full(5, 2), reward=full(5))


@pytest.mark.parametrize("change,word", [
    (dict(image=full(6, 16, 16, 3)), "uint8"),
    (dict(image=GOOD["image"][:5]), "one more"),
    (dict(image=GOOD["image"][:, :8]), "shape"),
    (dict(action=full(5, 3)), "(5, 2)"),
    (dict(action=full(4, 2)), "shape"),
    (dict(action=full(5, 2, value=np.nan)), "finite"),
    (dict(action=full(5, 2, value=3)), "[-1, 1]"),
    (dict(reward=full(5, value=np.inf)), "finite"),
    (dict(reward=full(0)), "at least one step"),
    (dict(action=np.array([{}] * 5)), "cannot be read"),
    (dict(reward=None), "reward is not a file"),
    (dict(action=full(5, 2, dtype=np.int64)), "floating point"),
    (dict(terminal=full(3, dtype=bool)), "one bool"),
])
def test_a_bad_episode_is_named(capsys, dots, tmp_path, change, word):
    data = tmp_path / "data"
    data.mkdir()
    shutil.copy(dots / "000.npz", data)
    bad = {name: array for name, array in (GOOD | change).items() if array is not None}
    np.savez(data / "bad.npz", **bad)
    one_sentence(capsys, tiny_flags(data=data, logdir=tmp_path / "run"), "bad.npz", word)


@pytest.mark.parametrize("damage", [
    lambda b: b[:len(b) // 2], lambda b: b"", lambda b: b[:300] + bytes(200) + b[500:]])
def test_a_truncated_episode_is_named(capsys, dots, tmp_path, damage):
    (tmp_path / "bad.npz").write_bytes(damage((dots / "000.npz").read_bytes()))
    argv = tiny_flags(data=tmp_path, logdir=tmp_path / "run")
    one_sentence(capsys, argv, "bad.npz", "cannot be read")


def test_too_little_data_and_wrong_rewards(capsys, dots, tmp_path):
    one_sentence(capsys, tiny_flags(data=dots, logdir=tmp_path, length=500), "--length")
    np.savez(tmp_path / "half.npz", **(GOOD | {"reward": full(5, value=0.5, dtype=float)}))
    argv = tiny_flags(data=tmp_path, logdir=tmp_path / "r", reward_head="bernoulli")
    one_sentence(capsys, argv, "--reward-head normal")


def test_a_run_of_another_config_is_named_field_by_field(capsys, finished, dots):
    argv = tiny_flags(data=dots, logdir=finished, horizon=2, gamma=0.5)
    one_sentence(capsys, argv, "horizon", "gamma", "3", "0.98")


def test_a_checkpoint_of_the_one_stage_program_is_not_continued(capsys, finished, dots, tmp_path):
    """Its config has the same fields; its state counted otherwise."""
    folder = shutil.copytree(finished, tmp_path / "old")
    checkpoint = checkpoint_of(folder)
    checkpoint["state"]["misses"] = checkpoint["state"].pop("failures")
    torch.save(checkpoint, folder / "checkpoint.pt")
    one_sentence(capsys, tiny_flags(data=dots, logdir=folder), "does not fit this program",
                 "choose another --logdir")


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_checkpoint(capsys, dots, tmp_path):
    assert run(dots, tmp_path, online_episodes=0, offline_updates=6) == 0
    path = tmp_path / "checkpoint.pt"
    assert path.stat().st_size > 0
    checkpoint = checkpoint_of(tmp_path)
    checkpoint["agent"]["modules"]["model"]["reward.0.weight"][:] = math.nan
    checkpoint["state"]["updates"] = 9
    torch.save(checkpoint, path)
    poisoned = path.read_bytes()
    argv = tiny_flags(data=dots, logdir=tmp_path, online_episodes=0)
    one_sentence(capsys, argv, "model loss", "nan", "--model-lr", "at update 10")
    assert path.read_bytes() == poisoned


def fails_plainly(result, *words):
    """A child's exit with code 2 and these words on stderr, without a traceback."""
    assert result.returncode == 2 and "Traceback" not in result.stderr, result.stderr
    assert all(word in result.stderr for word in words), result.stderr


def test_a_full_disk_is_one_sentence_and_loses_nothing(dots, tmp_path):
    assert run(dots, tmp_path, online_episodes=0) == 0
    before = (tmp_path / "checkpoint.pt").read_bytes()
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
    fails_plainly(child(limit + MAIN, *tiny_flags(data=dots, logdir=tmp_path)), "disk space")
    assert (tmp_path / "checkpoint.pt").read_bytes() == before
    assert not list(tmp_path.glob("*.partial"))


def test_a_checkpoint_that_would_run_code_does_not(capsys, dots, tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "owned"),)
    torch.save({"config": Evil()}, tmp_path / "checkpoint.pt")
    assert run(dots, tmp_path) == 2 and not (tmp_path / "owned").exists()


on_linux = pytest.mark.skipif(not sys.platform.startswith("linux"),
                              reason="the choice of MUJOCO_GL is Linux's")


@on_linux
def test_without_a_gl_backend_the_message_names_the_package(tmp_path):
    env = os.environ | {"MUJOCO_GL": "egl", "LIBGL_DRIVERS_PATH": "/none",
                        "__EGL_VENDOR_LIBRARY_DIRS": "/none"}
    fails_plainly(child(MAIN, "--preset", "debug", "--logdir", tmp_path, env=env),
                  "apt-get install")


# --------------------------------------------------------------------------------------------------
# Odd environments
# --------------------------------------------------------------------------------------------------

class Odd:
    """Gymnasium environments that are the toy's, each odd in one way: `registered(name=value, ...)`
    makes one, whose attributes and methods these are."""
    count = itertools.count()

    @staticmethod
    def registered(**changes):
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
    def reward(number, value):
        return Odd.from_step(number, lambda answer: (answer[0], value, *answer[2:]))

    @staticmethod
    def info(number, value):
        return Odd.from_step(number, lambda answer: (*answer[:4], value))

    @staticmethod
    def picture(number, change):
        """Pictures that are changed from that step on."""
        def render(self):
            image = super(type(self), self).render()
            return change(image) if getattr(self, "count", 0) >= number else image
        return Odd.from_step(99, None) | {"render": render}


PICTURE = np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8)
ONE = PICTURE[..., :1]                                        # of its channels
GRAY = np.repeat(ONE, 3, -1)
OPAQUE = np.full_like(ONE, 255)


@pytest.mark.parametrize("given, expected", [
    (PICTURE, PICTURE),
    (PICTURE[::-1, ::-1], PICTURE[::-1, ::-1]),
    ([PICTURE], PICTURE),
    (PICTURE[..., 0], GRAY),
    (ONE, GRAY),
    (PICTURE / 255, PICTURE),
    ((PICTURE / 255).astype(np.float32), PICTURE),
    (np.moveaxis(PICTURE, -1, 0), PICTURE),
    (np.moveaxis(ONE, -1, 0), GRAY),
    (np.concatenate([PICTURE, OPAQUE], -1), PICTURE),
    (PICTURE[..., 0] > 127, np.where(GRAY > 127, 255, 0)),
    (None, "NoneType"),
    ([], "list"),
    ([PICTURE, PICTURE], "list"),
    (PICTURE * 2.0, "from 0 to 1"),
    (PICTURE.astype(np.int64), "int64"),
    (np.full((6, 8, 3), np.nan), "from 0 to 1"),
    (PICTURE[..., :2], r"\(6, 8, 2\)"),
    (PICTURE[None], r"\(1, 6, 8, 3\)"),
    (PICTURE[:3], r"\(3, 8, 3\)"),
    (np.zeros((0, 0, 3), np.uint8), r"\(0, 0, 3\)"),
    (np.concatenate([PICTURE, ONE], -1), "transparent"),
])
def test_pictures_are_converted_where_that_is_unambiguous_and_refused_elsewhere(given, expected):
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=expected):
            gym_task.to_rgb(given)
    else:
        image = gym_task.to_rgb(given)
        assert image.dtype == np.uint8 and image.flags.c_contiguous
        np.testing.assert_array_equal(image, expected)


@pytest.mark.parametrize("low, high, dtype", [
    (0, 2, np.int64), (-128, 127, np.int8), (0, 255, np.uint8), (0, 10, np.int32),
    (-2 ** 53, 2 ** 53, np.int64), (-0.1, 5.0, np.float64), (-0.1, 0.7, np.float16),
    (-3e38, 3e38, np.float32), (-1.7e308, 1.7e308, np.float64)])
def test_actions_are_mapped_evenly_onto_any_bounded_box(low, high, dtype):
    box = gymnasium.spaces.Box(low, high, (1,), dtype)
    step = lambda self, action: (self.p, 0.0, False, False, {})
    env = moto.make_env(tiny(task=Odd.registered(action_space=box, step=step)))
    boxed = np.stack([env.to_box([a]) for a in np.linspace(-1, 1, 3001)])
    assert all(env.space.contains(value) for value in boxed)
    assert (np.diff(boxed[:, 0].astype(float)) >= 0).all()
    assert boxed[0] == env.space.low and boxed[-1] == env.space.high
    if high - low < 11 and dtype in (np.int64, np.int32):
        shares = np.unique(boxed, return_counts=True)[1]
        assert len(shares) == high - low + 1 and np.ptp(shares) <= 2


def old_reset(self, seed=None, options=None):
    self.p = np.zeros(2)
    return self.p


@pytest.mark.parametrize("changes, words", [
    (dict(render=lambda self: None), ["render() gave NoneType", "step 0"]),
    (dict(render=lambda self: 1 / 0), ["render", "ZeroDivisionError"]),
    (dict(step=lambda self, a: (self.p, 0.0, False, {})), ["step", "terminated, truncated"]),
    (dict(reset=lambda self: self.p), ["reset", "seed"]),
    (dict(reset=old_reset), ["reset", "observation, info"]),
    (Odd.info(1, {"success": {"left": True}}), ["success", "left", "step 1"]),
    (Odd.info(1, {"success": "yes"}), ["success", "yes", "step 1"]),
    (Odd.info(1, {"is_success": None}), ["is_success", "None", "step 1"]),
    (Odd.reward(1, None), ["reward", "None", "step 1"]),
    (Odd.reward(1, [1.0, 2.0]), ["reward", "[1.0, 2.0]", "step 1"]),
    (Odd.from_step(1, lambda answer: (*answer[:2], None, *answer[3:])), ["terminated", "None"]),
    (dict(__init__=lambda self, render_mode=None: 1 / 0), ["division by zero"]),
])
def test_an_environment_that_cannot_work_is_refused_when_it_is_made(
        tmp_path, capsys, changes, words):
    name = Odd.registered(**changes)
    argv = tiny_flags(task=name, data=tmp_path, logdir=tmp_path / "run")
    one_sentence(capsys, argv, name.removeprefix("gym:"), *words)


def test_a_name_that_exists_is_not_proposed_and_one_that_does_not_is(capsys, tmp_path):
    name = Odd.registered(__init__=lambda self, render_mode=None: 1 / 0)
    argv = lambda task: flags(task=task, logdir=tmp_path, device="cpu")
    assert "did you mean" not in one_sentence(capsys, argv(name))
    one_sentence(capsys, argv("gym:test/Dott-v0"), "gym:MODULE:ID", "did you mean")


@pytest.mark.parametrize("value, success", [
    (True, True), (np.bool_(False), False), (1, True), (0.0, False), (np.array([1.0]), True),
    (np.array([False]), False)])
def test_success_is_a_boolean_a_number_or_an_array_of_one(value, success):
    env = moto.make_env(tiny(task=Odd.registered(**Odd.info(1, {"success": value}))))
    env.reset([0])
    assert env.step(np.zeros(2))[-1] is success


@pytest.mark.parametrize("changes, words", [
    (Odd.reward(4, float("nan")), ["reward", "nan", "step 4"]),
    (Odd.info(4, {"success": "no"}), ["success", "no", "step 4"]),
    (Odd.from_step(4, lambda answer: 1 / 0), ["ZeroDivisionError", "step 4"]),
    (Odd.picture(4, lambda image: None), ["render() gave NoneType", "step 4"]),
    (Odd.picture(4, lambda image: image[:8]), ["(8, 16, 3)", "(16, 16, 3)", "step 4"]),
])
def test_a_fault_in_the_middle_of_a_run_is_named_and_what_was_learned_is_saved(
        dots, tmp_path, capsys, changes, words):
    """Offline there is no episode; the evaluation after it is the first to meet the fault."""
    name = Odd.registered(**changes)
    argv = tiny_flags(task=name, data=dots, logdir=tmp_path, save_every=100)
    one_sentence(capsys, argv, name.removeprefix("gym:"), *words)
    assert checkpoint_of(tmp_path)["state"]["updates"] == 12


# --------------------------------------------------------------------------------------------------
# Odd machines, folders and habits
# --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("broken", [False, True])
def test_nothing_decorative_fails_a_run(dots, tmp_path, broken):
    """Not a machine without the resource module and a display; nor a broken matplotlib."""
    backend = "no such backend" if broken else "tkagg"
    code = f"""
sys.modules["resource"] = None
os.environ.pop("DISPLAY", None)
os.environ["MPLBACKEND"] = {backend!r}
sys.path.insert(0, sys.argv[1])
sys.exit(moto.main(sys.argv[2:]) or t.reproduce.main([sys.argv[1] + "/run"]))
"""
    folder, pictures = tmp_path / "run", {"curve.png", "prediction.png"}
    done = child(code, tmp_path, *tiny_flags(data=dots, logdir=folder))
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    left = {path.name for path in folder.iterdir()}
    assert {"result.json", "eval.gif", "agent.pt"} <= left
    assert pictures & left == (set() if broken else pictures)
    for name in ("curve.png", "curves.png"):
        assert (f"note: no {name}" in done.stderr) == broken
    assert "| moto | 0 |" in done.stdout


def raising(error):
    def function(*args, **kwargs):
        raise error
    return function


def test_the_result_is_there_before_any_picture(dots, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pictures, "draw_curve", raising(moto.Stopped))
    assert run(dots, tmp_path) in (130, 143) and (tmp_path / "result.json").exists()


def test_runs_are_grouped_by_configuration_and_those_without_a_score_left_out(
        finished, tmp_path, capsys):
    def variation(name, **changes):
        path = shutil.copytree(finished, tmp_path / name) / "config.json"
        saved = read_json(path)
        saved["config"].update(changes)
        path.write_text(json.dumps(saved))
        return str(tmp_path / name)
    folders = [variation("a"), variation("b", seed=1, logdir="elsewhere", workers=2),
               variation("c", seed=2, beta=0.03), variation("d", variant="bc"), variation("begun")]
    (tmp_path / "begun" / "metrics.jsonl").write_text("")
    assert reproduce.main([*folders, folders[0] + "/../a"]) == 0
    out, err = capsys.readouterr()
    expected = [["moto, beta 5.0", "0, 1"], ["moto, beta 0.03", "2"], ["bc", "0"]]
    assert [row[1:] for row in rows_of(out)] == expected
    assert "nan" not in out and f"left out, without a score yet: {tmp_path / 'begun'}" in err
    one_sentence(capsys, [folders[-1]], "no score yet", "begun", program=reproduce)


@pytest.mark.parametrize("argv, words", [
    (["--evaluate", "RUN", "--seed", "7"], ["--seed is not used by --evaluate"]),
    (["--episodes", "3", "--preset", "debug"], ["--episodes is not used by training"]),
])
def test_a_flag_that_a_command_does_not_use_is_refused(finished, capsys, argv, words):
    one_sentence(capsys, [str(finished) if word == "RUN" else word for word in argv], *words)


def test_a_sweep_with_a_seed_twice_runs_it_once(dots, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    argv = [*sweep_flags(dots, "~/runs", offline_updates=1, online_episodes=0), "--tasks", DOT, DOT,
            "--variants", "bc", "bc", "--seeds", "1", "1"]
    assert reproduce.main(argv) == 0 and "1 runs" in capsys.readouterr().out
    assert [path.parent.parent.name for path in tmp_path.rglob("result.json")] == ["runs"]


def test_a_run_is_not_continued_with_other_data_or_by_another_version(dots, tmp_path, capsys):
    folder = tmp_path / "run"
    assert run(dots, folder, online_episodes=0) == 0
    same_data = shutil.copytree(dots, tmp_path / "same")
    assert run(same_data, folder, online_episodes=0) == 0     # another folder, the same content
    before = content(folder)
    other = dot_episodes(tmp_path / "other", 6, seed=1)
    longer = lambda data: tiny_flags(data=data, logdir=folder, online_episodes=1)
    one_sentence(capsys, longer(other), "not what", "began with", "--data")
    after = content(folder)
    assert {name: after[name] for name in before} == before
    config, checkpoint = folder / "config.json", folder / "checkpoint.pt"
    saved, state = read_json(config), checkpoint_of(folder)
    del saved["config"]["warmup"], state["config"]["warmup"]        # before there was such a field
    config.write_text(json.dumps(saved))
    torch.save(state, checkpoint)
    one_sentence(capsys, longer(dots), "warmup (nothing there, 1 now)")
    one_sentence(capsys, ["--evaluate", str(folder)], "another version", "warmup")


def test_a_run_that_died_before_its_first_checkpoint_begins_again_and_one_that_lost_it_does_not(
        dots, tmp_path, capsys):
    assert run(dots, tmp_path, online_episodes=0) == 0
    argv = tiny_flags(data=dots, logdir=tmp_path, online_episodes=0)
    rows = metrics_of(tmp_path)
    for path in tmp_path.glob("checkpoint*.pt"):
        path.unlink()
    one_sentence(capsys, argv, "cannot be continued")
    assert len(metrics_of(tmp_path)) == len(rows)
    (tmp_path / "agent.pt").unlink()                          # as published runs are: config and
    (tmp_path / "result.json").unlink()                       # metrics alone
    one_sentence(capsys, argv, "cannot be continued")
    early = [json.dumps(row) + "\n" for row in metrics_of(tmp_path) if "evaluation" not in row]
    (tmp_path / "metrics.jsonl").write_text("".join(early))
    assert run(dots, tmp_path, online_episodes=0) == 0
    assert len(metrics_of(tmp_path)) == len(rows)


@pytest.mark.parametrize("method, dies", [
    ("update", lambda state: state["updates"] == 17),
    ("save", lambda state: "final" in state["scores"])])
def test_what_was_logged_after_the_last_checkpoint_is_there_once(
        finished, dots, tmp_path, monkeypatch, method, dies):
    """The last checkpoint is that of update 12, older than an episode, some updates or a score."""
    true_method = getattr(moto.Run, method)

    def dying(self, *args):
        if dies(self.state):
            raise RuntimeError("as if killed")
        return true_method(self, *args)
    with monkeypatch.context() as patch:
        patch.setattr(moto.Run, method, dying)
        with pytest.raises(RuntimeError):
            run(dots, tmp_path, save_every=100)
    assert checkpoint_of(tmp_path)["state"]["updates"] == 12 < metrics_of(tmp_path)[-1]["updates"]
    lengths, true_log = [], moto.Run.log

    def measured(self, row):
        true_log(self, row)
        lengths.append((self.state["logged"], (tmp_path / "metrics.jsonl").stat().st_size))
    monkeypatch.setattr(moto.Run, "log", measured)
    assert run(dots, tmp_path, save_every=100) == 0
    assert all(logged == size for logged, size in lengths)
    assert metrics_of(tmp_path, "seconds") == metrics_of(finished, "seconds")


def test_a_replay_that_has_no_room_is_refused(capsys, dots, tmp_path):
    argv = tiny_flags(data=dots, online_episodes=10 ** 12, logdir=tmp_path)
    one_sentence(capsys, argv, "no room", "--online-episodes")


@pytest.mark.parametrize("argv, words", [
    (["--device", "mps"], ["mps", "one of cpu"]),
    (["--device", "meta"], ["meta"]),
    (["--device", "cuda:x"], ["cuda:x"]),
    (["--device", "cuda:9"], ["cuda:9", "one of cpu"]),
    (["--seed", str(2 ** 32)], ["--seed", "4294967296)"]),
    (["--seed", "-1"], ["--seed", "[0, "]),
])
def test_devices_and_seeds_that_cannot_work_are_named(capsys, tmp_path, argv, words):
    one_sentence(capsys, ["--logdir", tmp_path, "--preset", "debug", *argv], *words)


def test_home_in_paths(dots, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    cfg = tiny(data="~/data", logdir="~/run", cache="~/demos")
    folders = [str(tmp_path / name) for name in ("data", "run", "demos")]
    assert [cfg.data, cfg.logdir, cfg.cache] == folders


def test_a_script_without_a_main_guard_is_told_before_anything_is_trained(dots, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(f"import sys\nsys.path.insert(0, {str(HERE)!r})\nimport test_moto\n"
                      "sys.exit(test_moto.moto.main(sys.argv[1:]))\n")
    argv = tiny_flags(task=DOT, data=dots, logdir=tmp_path / "run", workers=2)
    done = subprocess.run([sys.executable, script, *argv], capture_output=True, text=True)
    fails_plainly(done, "__main__")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_compiler_that_cannot_compile_leaves_the_eager_form(tmp_path):
    code = """
agent = moto.MOTO(t.tiny(), 2, True, "cpu", compiled=True)
print(agent.update(t.practice_batch(agent.cfg, T=5))["model/kl"])
"""
    broken = {"CXX": "/bin/false", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = child(code, env=os.environ | broken)
    assert done.returncode == 0 and math.isfinite(float(done.stdout)), done.stderr


@on_linux
@pytest.mark.parametrize("name, value", [
    ("MUJOCO_GL", "nonsense"), ("PYOPENGL_PLATFORM", "glx"), ("MUJOCO_GL", "disabled")])
def test_a_users_gl_setting_that_does_not_work_is_named_as_the_cause(tmp_path, name, value):
    unset = "MUJOCO_GL", "PYOPENGL_PLATFORM", "DISPLAY"
    env = {k: v for k, v in os.environ.items() if k not in unset} | {name: value}
    argv = flags(preset="debug", device="cpu", logdir=tmp_path)
    fails_plainly(child(MAIN, *argv, env=env), "unset MUJOCO_GL and PYOPENGL_PLATFORM")


def test_frozen_leaves_what_was_frozen_before(agent):
    mine = agent.model.decoder.inp
    mine.requires_grad_(False)
    with baselines.frozen(agent.model):
        assert not any(p.requires_grad for p in agent.model.parameters())
    assert not any(p.requires_grad for p in mine.parameters())
    assert agent.model.gru.weight_ih.requires_grad
    before = mine.weight.clone()
    agent.update(practice_batch(agent.cfg))
    assert torch.equal(before, mine.weight)


def test_the_value_estimate_is_for_what_acts_and_by_the_target_critics(agent):
    """On the first image three times; the averaged weights and the trained ones differ here."""
    image, policy = random_image(), agent.ema_policy
    for name in ("encoder", "prior", "actor", "critic"):
        randomised(agent.modules[name])
    randomised(policy.actor)
    e = policy.encoder(moto.to_image(torch.as_tensor(image)).repeat(3, 1, 1)[None])
    b = policy.prior(e).mode
    d = ((b + 0.15 * policy.actor(e)).clamp(-1, 1) - b) / 0.15
    q = agent.target(e, d).mean() * (1 - agent.cfg.gamma)
    assert agent.value_estimate(image) == pytest.approx(float(q), abs=1e-6)


def test_rollout_workers_get_what_acts_alone_and_do_not_probe_opengl_again(drawer, monkeypatch):
    sent, policy = [], tiny_agent().ema_policy
    workers = RolloutWorkers(tiny(), drawer)
    workers.each = lambda function, items: sent.extend(acting for acting, _ in items)
    workers.pool = True
    workers.play(policy, [[0, 1, 0]])
    received, image = pickle.loads(sent[0]), batch_of(tiny())["image"][0, 0].numpy()
    names = received.state_dict()
    assert not any("decoder" in name or "priors" in name for name in names)
    assert "actor.net.0.weight" in names
    np.testing.assert_array_equal(received.act(image)[0], policy.act(image)[0])
    monkeypatch.setattr(subprocess, "run", raising(AssertionError("an interpreter was started")))
    monkeypatch.delitem(sys.modules, "mujoco", raising=False)
    monkeypatch.setitem(rollout_workers.worker, "cfg", tiny())
    assert meta_world.choose_gl() == ""


def test_a_stop_between_two_lines_of_metrics_loses_none_of_their_means(
        dots, tmp_path, monkeypatch):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    changes = dict(log_every=4, online_episodes=0)
    assert run(dots, whole, **changes) == 0
    with monkeypatch.context() as patch:
        patch.setattr(moto.MOTO, "update", stopping_at(7, signal.SIGTERM, moto.MOTO.update))
        assert run(dots, parts, **changes) == 143
    assert run(dots, parts, **changes) == 0
    rows = metrics_of(whole, "seconds")
    assert rows == metrics_of(parts, "seconds")
    assert len(rows) == 4                                     # three of updates, and the score
    assert {"prior/behaviour_nll", "model/kl"} <= rows[1].keys()        # updates 5 to 8


def test_a_run_keeps_the_precision_it_began_with(tmp_path, monkeypatch):
    """The trial that decides on bfloat16 may end otherwise on a busy machine."""
    monkeypatch.setattr(moto, "bfloat16_pays", lambda: True)
    assert moto.build_config(device="cpu", logdir=str(tmp_path)).precision == "bfloat16"
    (tmp_path / "config.json").write_text(json.dumps({"config": {"precision": "float32"}}))
    assert moto.build_config(device="cpu", logdir=str(tmp_path)).precision == "float32"


def test_an_agent_without_a_source_file_can_train(dots, tmp_path):
    code = ("class Mine(moto.BC):\n pass\nmoto.AGENTS['mine'], moto.VARIANTS['mine'] = Mine, {}\n"
            "sys.exit(moto.main(sys.argv[1:]))")
    own = dict(variant="mine", data=dots, logdir=tmp_path / "run", online_episodes=0)
    done = child(code, *tiny_flags(**own))
    assert done.returncode == 0 and (tmp_path / "run" / "moto.py").exists(), done.stderr


def test_online_rewards_must_fit_the_reward_head(dots, tmp_path):
    own = dict(data=str(dots), logdir=str(tmp_path), reward_head="bernoulli")
    started = moto.Run(tiny(**own))
    started.open_data()
    image = np.zeros((13, 16, 16, 3), np.uint8)
    moto.save_episode(started.episode_path(0), image, np.zeros((12, 2)), [0] * 11 + [2])
    with pytest.raises(moto.UserError, match="--reward-head normal"):
        started.load(started.episode_path(0))


# --------------------------------------------------------------------------------------------------
# The real simulator
# --------------------------------------------------------------------------------------------------

def on_drawer(**changes):
    return moto.build_config(**(dict(task="drawer-open", device="cpu") | changes))


@pytest.fixture(scope="module")
def drawer():
    env = moto.make_env(on_drawer())
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
    assert np.array_equal(a, c) and np.array_equal(goal_a, goal_c)
    assert not np.array_equal(goal_a, goal_b)
    assert a.shape == (9, 64, 64, 3) and a.dtype == np.uint8 and a.std() > 20
    rgb = a[0].astype(int)
    red = (rgb[..., 0] - rgb[..., 1:].max(-1)) > 60           # the arm enters from above: the
    assert red[:32].sum() > red[32:].sum() > -1               # picture is not upside down


def test_metaworld_protocol(drawer):
    drawer.reset([0, 0, 5])
    assert drawer.env.curr_path_length == 10
    image, reward, terminal, over, success = drawer.step(np.zeros(4))
    assert drawer.env.curr_path_length == 12
    assert (reward, terminal, over, success) == (0.0, False, False, False)


def test_rollout_workers_play_what_one_process_plays(tmp_path):
    """Two processes: metrics, episodes and weights are equal to those of one."""
    one, two = tmp_path / "1", tmp_path / "2"
    for logdir in (one, two):
        done = child(MAIN, *flags(
            task="drawer-open", preset="debug", precision="float32", device="cpu",
            workers=logdir.name, episode_steps=50, final_episodes=3, offline_updates=5,
            online_episodes=3, updates_per_episode=3, eval_every=5, demos=1,
            cache=tmp_path / "demos", logdir=logdir))
        assert done.returncode == 0, done.stderr
    actions = [moto.load_episode(logdir / "episodes/00002.npz", 64, 4)["action"]
               for logdir in (one, two)]
    np.testing.assert_array_equal(*actions)
    assert metrics_of(one, "seconds") == metrics_of(two, "seconds")
    assert same_weights(one, two)


def test_a_rollout_worker_that_dies_is_one_sentence(drawer):
    cfg = on_drawer(preset="debug", workers=2)
    workers, policy = RolloutWorkers(cfg, drawer), moto.MOTO(cfg, 4, False, "cpu").ema_policy
    try:
        pid = workers.pool.submit(os.getpid).result()
        waiting = workers.play(policy, [[0, 2, i] for i in range(4)])
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(moto.UserError, match="--workers"):
            list(waiting)
    finally:
        workers.close()


def test_rollout_workers_end_with_their_parent(tmp_path):
    """kill -9 of the program leaves no process behind."""
    code = """
import signal
cfg = t.on_drawer(preset="debug", workers=2)
workers = t.RolloutWorkers(cfg, None)
print(*{workers.pool.submit(os.getpid).result() for _ in range(8)}, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = child(code, timeout=100)                           # they would hold its output open
    pids = [int(word) for word in done.stdout.split()]
    assert pids and done.returncode == -signal.SIGKILL
    commands = [Path(f"/proc/{pid}/cmdline") for pid in pids]
    for _ in range(200):
        if not any(path.exists() and path.read_bytes() for path in commands):
            break
        signal.sigtimedwait([], 0.1)
    else:
        raise AssertionError("rollout workers outlived their parent")


def test_bench_measures_and_its_parts_add_up(capsys):
    argv = flags(task="drawer-open", preset="debug", device="cpu", precision="float32")
    assert bench.main(["--json", *argv]) == 0
    result = json.loads(capsys.readouterr().out)
    for name in ("updates_per_second", "env_steps_per_second", "render_speedup", "peak_memory_gb"):
        assert result[name] > 0
    assert {"fraction_of_peak", "speedup_over_eager_fp32"} <= result.keys()
    assert 0 < result["fraction_of_peak"] < 1 and set(result["forms"]) == {"plain", "eager"}
    parts = result["parts"]
    stages = [*map(parts.pop, ("update of the prior", "offline update", "online update"))]
    both, practice = ("model", "filter", "imagination", "critic"), ("actor",)
    assert set(parts) == {"data", "behaviour prior", *both, *practice, "optimisers"}
    for stage, names in zip(stages, (("behaviour prior",), both, both + practice)):
        count = sum(parts[name]["gflop"] for name in names)   # counted, not timed
        assert 0.98 < count / stage["gflop"] < 1.02
    assert set(result["growth"]) == {"batch B", "sequence length T", "ensemble K", "horizon H",
                                     "width", "sampling"}


def test_auc_is_the_probability_of_the_right_order():
    assert diagnose.auc([2, 3], [1, 2]) == 3.5 / 4 and diagnose.auc([0], [0]) == 0.5
    assert math.isnan(diagnose.auc([], [1]))


def test_diagnosis_begins_with_the_value_estimate():
    agent = online_agent(critics=1)
    randomised(agent.actor)
    images = [np.roll(random_image(), n, 0) for n in range(6)]
    values = agent.values(np.stack(images)).numpy()
    assert values.shape == (6,) and values.std() > 0
    np.testing.assert_allclose(values[0], agent.value_estimate(images[0]), rtol=1e-4)


def test_diagnosis_asks_for_the_disagreement_of_whole_decisions():
    agent = online_agent(hold=3)
    images = [np.roll(random_image(), n, 0) for n in range(6)]
    actions = [np.full(2, 0.1 * n, np.float32) for n in range(5)]
    episode = {"image": images, "action": actions, "reward": [0.0] * 5}

    def ask():
        torch.manual_seed(0)
        return diagnose.disagreements(agent, episode, np.random.default_rng(0))
    executed, uniform, corrected = ask()
    assert executed.shape == (3,) and (uniform != executed).all() and (corrected != executed).all()
    agent.cfg.bound = 0.0
    np.testing.assert_allclose(ask()[2], executed)            # without a bound: the executed ones
    actions[4] = -actions[4]                                  # the third step of the last decision
    changed = ask()[0]
    np.testing.assert_allclose(changed[:2], executed[:2])
    assert changed[2] != executed[2]


def test_diagnose_prints_what_a_run_knows_and_refuses_one_without_a_model(
        dots, finished, tmp_path, capsys):
    assert diagnose.main([str(finished), "--episodes", "2"]) == 0
    out = capsys.readouterr().out
    for words in ("success", "AUC of the critics, by step: 0:", "uniform: AUC", "actor/value"):
        assert words in out
    assert run(dots, tmp_path / "bc", variant="bc", online_episodes=0) == 0
    one_sentence(capsys, [tmp_path / "bc"], "bc", "no world model", program=diagnose)
    one_sentence(capsys, [finished, "--episodes", "0"], "--episodes is 0", program=diagnose)


def test_operations_are_counted_right():
    a, b = torch.randn(8, 16), torch.randn(16, 32)
    assert bench.flops(lambda: a @ b) == 2 * 8 * 16 * 32


def test_scripted_demonstrations_succeed_are_cached_and_never_reused_wrongly(drawer, tmp_path):
    cfg = on_drawer(workers=1, demos=1, demo_noise=0.0, cache=str(tmp_path))
    workers = RolloutWorkers(cfg, drawer)
    path, = demonstrations.collect_demos(cfg, workers)
    episode = moto.load_episode(path, 64, 4)
    reward = episode["reward"]
    assert reward.max() == 1 and len(reward) == reward.argmax() + 1 + demonstrations.DEMO_TAIL
    assert np.abs(episode["action"]).max() <= 1
    stamp = path.stat().st_mtime_ns
    assert demonstrations.collect_demos(cfg, workers) == [path] and path.stat().st_mtime_ns == stamp
    noisier = dataclasses.replace(cfg, demo_noise=0.01)
    other, = demonstrations.collect_demos(noisier, RolloutWorkers(noisier, drawer))
    assert other.parent != path.parent


def test_processes_collect_the_demonstrations_that_one_process_collects(tmp_path):
    """With too little time for some attempts: the same ones are kept, with the same content."""
    kept = []
    for count in (1, 2):
        cfg = on_drawer(workers=count, demos=3, episode_steps=53, image_size=16,
                        cache=str(tmp_path / str(count)))
        env = moto.make_env(cfg)
        workers = RolloutWorkers(cfg, env)
        kept.append({path.name: moto.load_episode(path, 16, 4)["action"]
                     for path in demonstrations.collect_demos(cfg, workers)})
        workers.close()
        env.close()
    one, two = kept
    assert list(one) == list(two) != [f"attempt{i:04d}.npz" for i in range(3)]
    assert all(np.array_equal(one[name], two[name]) for name in one)


def test_command_line_end_to_end_on_a_real_task(tmp_path):
    def command(*argv):
        result = subprocess.run([sys.executable, program, *argv], capture_output=True, text=True,
                                cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        return result.stdout
    logdir, program = tmp_path / "run", HERE / "moto.py"
    out = command("--task", "drawer-open", "--preset", "debug", "--logdir", logdir,
                  "--cache", tmp_path / "demos")
    assert "offline" in out and read_json(logdir / "result.json")["updates"] == 50
    assert json.loads(command("--evaluate", logdir, "--episodes", "1"))["episodes"] == 1
    (logdir / "evaluate.gif").unlink()
    program = logdir / "moto.py"                 # the folder has all that its own source needs
    assert json.loads(command("--evaluate", logdir, "--episodes", "1"))["updates"] == 50
    assert (logdir / "evaluate.gif").exists()


# --------------------------------------------------------------------------------------------------
# Franka Kitchen
# --------------------------------------------------------------------------------------------------

needs_kitchen = pytest.mark.skipif(importlib.util.find_spec("gymnasium_robotics") is None,
                                   reason="the extra for Franka Kitchen is not installed")
TINY_KITCHEN = dict(task="kitchen-mixed", preset="debug", device="cpu", image_size=16, workers=1)


def kitchen_config(**changes):
    return moto.build_config(**(TINY_KITCHEN | changes))


@pytest.fixture(scope="module")
def kitchen():
    env = moto.make_env(kitchen_config())
    yield env
    env.close()


def observation(env):
    """What FrankaKitchen-v1 observes, without its noise: positions and velocities of the robot,
    then of the objects."""
    q, v = env.data.qpos, env.data.qvel
    return np.concatenate([q[:9], v[:9], q[9:], v[9:]])


@needs_kitchen
def test_kitchen_pays_for_each_object_in_place_and_never_ends(kitchen):
    from gymnasium_robotics.envs.franka_kitchen import kitchen_env
    where, goals = kitchen_env.OBS_ELEMENT_INDICES, kitchen_env.OBS_ELEMENT_GOALS
    reward_now = lambda: kitchen.restore(observation(kitchen))[1]
    kitchen.reset([0, 0, 0])
    for count, name in enumerate(kitchen.targets, 1):
        kitchen.data.qpos[where[name]] = goals[name]
        state = observation(kitchen)
        assert kitchen.restore(state)[1] == count
        image, *rest = kitchen.step(np.zeros(9))
        assert rest == [count, False, False, count == 4] and image.shape == (16, 16, 3)
        kitchen.restore(state)
    kitchen.data.qpos[where["kettle"]] += 1                            # out again: the reward falls
    assert reward_now() == 3
    kitchen.data.qpos[where["slide cabinet"]] = goals["slide cabinet"]    # no target of "mixed"
    assert reward_now() == 3


@needs_kitchen
def test_kitchen_scripts_do_their_sub_tasks_and_never_the_whole_task(kitchen, monkeypatch):
    """Every sub-task alone works at the demonstrations' noise; the drawn sequences vary, and are
    never the task's four."""
    cfg, alone, targets = kitchen_config(), {}, set(kitchen.targets)
    for name in franka_kitchen.SCRIPTS:
        with monkeypatch.context() as patch:
            patch.setattr(franka_kitchen, "draw_sequence", lambda targets, rng: [name])
            _, actions, rewards, worked = demonstrations.demonstrate(cfg, kitchen, [0, 0, 1])
        alone[name] = (worked and kitchen.in_place(name) and len(actions) < 120
                       and max(rewards) == (name in targets))
    assert all(alone.values()), alone
    drawn = [tuple(franka_kitchen.draw_sequence(kitchen.targets, np.random.default_rng(seed)))
             for seed in range(200)]
    assert all(len(set(s)) == 4 and len(set(s) & targets) == 3 for s in drawn)
    assert len(set(drawn)) > 20
    assert {name for s in drawn for name in s} == set(franka_kitchen.SCRIPTS)
    missing = [name for s in drawn for name in targets - set(s)]
    assert min(map(missing.count, targets)) > 30              # each is left out now and then


@needs_kitchen
def test_kitchen_kettle_script_forgives_a_policy_that_is_late(kitchen, monkeypatch):
    """The last push, kept up for ten steps after the kettle is in place, leaves it there,
    upright."""
    site, points, _ = franka_kitchen.SCRIPTS["kettle"]
    late = []
    for seed in range(4):
        rng = np.random.default_rng(seed)
        kitchen.reset([0, 0, seed])
        origin, after = kitchen.data.site(site).xpos.copy(), 0
        *way, last = [(origin + offset, grip) for offset, grip in points]
        approach = (franka_kitchen.reach(kitchen, *point, 0.08) for point in way)
        push = franka_kitchen.reach(kitchen, *last, 0.055, near=0, most=100)
        for a in itertools.chain(*approach, push):
            kitchen.env.step(np.clip(a + 0.1 * rng.standard_normal(9), -1, 1))
            after += bool(after or kitchen.in_place("kettle"))
            if after == 11:
                break
        late.append(after == 11 and kitchen.in_place("kettle"))
    assert all(late), late
    description = kitchen.describe()                          # so that demonstrations made by other
    assert description["scripts"] == franka_kitchen.SCRIPTS   # scripts are not taken for these
    with monkeypatch.context() as changed:
        changed.setattr(franka_kitchen, "reach", lambda env, target: iter(()))
        assert kitchen.describe() != description


@needs_kitchen
def test_kitchen_demonstrations_that_reach_all_four_are_refused(kitchen, monkeypatch):
    cfg = kitchen_config()
    assert max(kitchen.unseen_episode()["reward"]) == 4 and not kitchen.all_four
    with monkeypatch.context() as patch:
        patch.setattr(kitchen, "all_four", True)
        seeds = [moto.episode_seed(cfg, "evaluation", 20_000 + index) for index in range(2)]
        attempts = [demonstrations.demonstrate(cfg, kitchen, seed) for seed in seeds]
    assert any(max(rewards) == 4 for _, _, rewards, _ in attempts)
    assert not any(worked for *_, worked in attempts)


def minari_set(name, states, actions, monkeypatch, folder):
    """A local data set of D4RL's layout, made without a network."""
    import gymnasium, minari
    from minari.data_collector import EpisodeBuffer
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(folder))
    buffers = [EpisodeBuffer(id=i, seed=i, options=None, observations={"observation": s}, actions=a,
                             rewards=np.zeros(len(a)), terminations=[False] * len(a), infos={},
                             truncations=[False] * (len(a) - 1) + [True])
               for i, (s, a) in enumerate(zip(states, actions))]
    box = lambda n: gymnasium.spaces.Box(-np.inf, np.inf, (n,), np.float64)
    minari.create_dataset_from_buffers(
        dataset_id=name, buffer=buffers, action_space=box(actions[0].shape[1]),
        observation_space=gymnasium.spaces.Dict(observation=box(states[0].shape[1])))


@needs_kitchen
def test_minari_states_are_rendered_and_paid_anew(kitchen, tmp_path, monkeypatch):
    """Recorded with the rewards of another task: images are those of the simulator, rewards those
    of this task's objects."""
    pytest.importorskip("minari")
    rng, states, actions, truth = np.random.default_rng(0), [], [], []
    for episode in range(3):
        images, rewards = [kitchen.reset([0, 0, episode])], []
        sequence = ["kettle"] if episode == 1 else ["slide cabinet"]
        kitchen.script = franka_kitchen.play_script(kitchen, sequence)
        s, a = [observation(kitchen)], []
        for _ in range(45):
            noise = 0.02 * rng.standard_normal(9)
            a.append(np.clip(kitchen.scripted_action() + noise, -1, 1))
            image, reward, *_ = kitchen.step(a[-1])
            s.append(observation(kitchen))
            images.append(image)
            rewards.append(reward)
        states.append(np.array(s))
        actions.append(np.array(a))
        truth.append((np.stack(images), np.array(rewards)))
    minari_set("test/kitchen-v0", states, actions, monkeypatch, tmp_path / "minari")
    cfg = kitchen_config(data="minari:test/kitchen-v0", workers=2, cache=str(tmp_path / "cache"))
    workers = RolloutWorkers(cfg, kitchen)
    try:
        paths = moto.offline_paths(cfg, workers)
        assert len(paths) == 3 and truth[1][1].max() == 1 and truth[0][1].max() == 0
        for path, (images, rewards), a in zip(paths, truth, actions):
            episode = moto.load_episode(path, 16, 9)
            np.testing.assert_array_equal(episode["reward"], rewards)
            np.testing.assert_allclose(episode["action"], a, atol=1e-6)
            # A picture after a step is 2 ms older than the state: single pixels at edges differ
            image = episode["image"].astype(int)
            exact, shifted = np.abs(image - images).mean(), np.abs(image[1:] - images[:-1]).mean()
            assert exact < 0.3 and shifted > 3 * exact, exact
        stamp = paths[0].stat().st_mtime_ns
        paths[1].unlink()                                     # interrupted: what lacks is made, and
        assert moto.offline_paths(cfg, workers) == paths and paths[1].exists()
        assert paths[0].stat().st_mtime_ns == stamp           # what is there stays
    finally:
        workers.close()


class Recorded:
    """A Minari data set whose episodes have these observations."""

    def __init__(self, observations):
        self.observations = observations

    def iterate_episodes(self):
        content = {"observations": self.observations, "actions": np.zeros((4, 9))}
        return [type("Episode", (), content)]


@needs_kitchen
@pytest.mark.parametrize("fault, words", [
    ("another robot", r"float64 \(5, 17\)"),
    ("damaged", "minari download"),
    ("missing", "minari download"),
    ("another task", "kitchen-partial"),
    ((np.zeros((5, 59)),), "observations tuple"),
    ({"state": np.zeros((5, 59))}, "observations NoneType"),
    ({"observation": np.full((5, 59), np.nan)}, "finite"),
])
def test_a_wrong_minari_set_is_one_sentence(kitchen, tmp_path, monkeypatch, fault, words):
    minari = pytest.importorskip("minari")
    state = np.zeros((5, 17 if fault == "another robot" else 59))
    minari_set("test/wrong-v0", [state], [np.zeros((4, 9))], monkeypatch, tmp_path)
    if fault == "damaged":
        for path in tmp_path.rglob("*.hdf5"):
            path.write_bytes(path.read_bytes()[:200])
    if not isinstance(fault, str):
        monkeypatch.setattr(minari, "load_dataset", lambda *args, **kwargs: Recorded(fault))
    monkeypatch.setattr(socket.socket, "connect", raising(OSError("no network")))
    name = "missing-v0" if fault == "missing" else "wrong-v0"
    cfg = kitchen_config(data=f"minari:test/{name}", cache=str(tmp_path / "cache"))
    if fault == "another task":
        cfg = dataclasses.replace(cfg, task="hammer")
    with pytest.raises(moto.UserError, match=words):
        moto.offline_paths(cfg, RolloutWorkers(cfg, kitchen))


@needs_kitchen
def test_a_kitchen_run_whose_scripts_never_complete_all_four_ends_with_its_result(tmp_path, capsys):
    images, actions = np.zeros((13, 16, 16, 3), np.uint8), np.zeros((12, 9))
    for index in range(2):
        moto.save_episode(tmp_path / f"{index}.npz", images, actions, np.zeros(12))
    logdir = tmp_path / "run"
    argv = flags(**TINY_KITCHEN, data=tmp_path, episode_steps=12, offline_updates=2,
                 online_episodes=0, logdir=logdir)
    assert moto.main(argv) == 0
    assert "no combination.png" in capsys.readouterr().err
    left = {path.name for path in logdir.iterdir()}
    assert {"result.json", "eval.gif", "prediction.png"} <= left


def test_kitchen_without_its_extra_names_the_command(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(moto.UserError, match="pip install gymnasium-robotics"):
        moto.make_env(kitchen_config())


@needs_kitchen
def test_kitchen_from_the_command_line(tmp_path):
    """Demonstrations, both phases, counts of objects, and the paper's Figure 4."""
    logdir, demos = tmp_path / "run", tmp_path / "demos"
    values = TINY_KITCHEN | dict(workers=2, offline_updates=4, online_episodes=1, demos=2,
                                 updates_per_episode=2, final_episodes=2)
    done = child(MAIN, *flags(**values, cache=demos, logdir=logdir))
    assert done.returncode == 0, done.stderr
    result = read_json(logdir / "result.json")
    assert 0 <= result["final_completed"] <= 4 and sum(result["final_counts"]) == 2
    assert (logdir / "combination.png").stat().st_size > 10_000
    for path in demos.rglob("attempt*.npz"):
        assert moto.load_episode(path, 16, 9)["reward"].max() <= 3
    assert reproduce.main([str(logdir)]) == 0


# --------------------------------------------------------------------------------------------------
# Learning
# --------------------------------------------------------------------------------------------------

def test_moto_beats_its_own_behaviour_prior(tmp_path):
    """The demonstrator dawdles, and so does its clone. Corrected in practice, the policy is
    there sooner."""
    common = dict(
        data=dot_episodes(tmp_path / "data", 12, speed=0.3, noise=0.3), batch=8, length=8,
        channels=8, deter=64, stoch=8, hidden=64, critics=5, bound=0.3, horizon=1, warmup=0,
        offline_updates=200, online_episodes=16, updates_per_episode=25, final_episodes=50,
        save_every=1000, model_lr=3e-3, actor_lr=1e-3, critic_lr=2e-3, gamma=0.9, log_every=50,
        reward_head="bernoulli")
    scores = {}
    prior = dict(variant="bc", offline_updates=600, online_episodes=0)
    for name, own in (("prior", prior), ("moto", {})):
        assert moto.main(tiny_flags(**(common | own), logdir=tmp_path / name)) == 0
        scores[name] = read_json(tmp_path / name / "result.json")
    assert scores["moto"]["final_success"] >= 0.8, scores
    before = max(scores["prior"]["final_return"], scores["moto"]["offline_return"])
    assert scores["moto"]["final_return"] >= 1.15 * before > 0, scores


@pytest.mark.parametrize("variant", ["bc", "iql", "cql"])
def test_the_baselines_learn_the_toy_task(tmp_path, variant):
    data = dot_episodes(tmp_path / "data", 20, speed=1.0, noise=0.2)
    argv = tiny_flags(
        variant=variant, data=data, logdir=tmp_path / "run", batch=16, length=8, channels=8,
        deter=48, stoch=16, hidden=64, offline_updates=300, online_episodes=0, final_episodes=40,
        save_every=1000, actor_lr=1e-3, gamma=0.9, reward_head="bernoulli", shift=1)
    assert moto.main(argv) == 0
    assert read_json(tmp_path / "run" / "result.json")["final_success"] >= 0.7


def test_the_toy_starts_on_the_right_and_its_scores_are_those_of_its_episodes():
    env = toy.make()
    demos = toy.demonstrate(env, 3)
    assert len(demos) == 3 and all(demo["reward"].any() for demo in demos)
    for demo in demos:
        x, y = toy.where(demo["image"])
        assert x[0] > 0 and np.hypot(x, y)[1:][demo["reward"] > 0].max() < toy.RADIUS + 0.1
    steps = toy.STEPS
    assert toy.infinite_return([0] * 2 + [1] * (steps - 2)) == pytest.approx(0.9 ** 2)
    assert toy.infinite_return([1] + [0] * (steps - 1)) == pytest.approx(0.1)
    learner, metrics, played = toy.train(env, demos, offline_updates=1, online_episodes=2,
                                         updates_per_episode=2, warmup=0, episode_steps=3)
    assert len(metrics) == 6 and "actor/value" in metrics[-1] and len(played) == 2
    row = toy.measure(learner, played)
    real = [toy.infinite_return(episode["reward"]) for episode in played[1]]
    assert row["online"] == pytest.approx(np.mean(real), abs=1e-4)
    promised = [learner.value_estimate(episode["image"][0]) for episode in played[1]
                if toy.where(episode["image"][:1])[0][0] < 0]
    assert row["promised_left"] == pytest.approx(np.mean(promised), abs=1e-4)


def test_every_agent_of_the_toy_is_recorded_with_the_same_seeds():
    recorded = read_json(toy.FILE)
    assert set(recorded) == set(toy.AGENTS)
    assert len({tuple(rows) for rows in recorded.values()}) == 1 and len(recorded["moto"]) >= 3


# --------------------------------------------------------------------------------------------------
# The notebook
# --------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def notebook():
    import nbformat
    return nbformat.read(HERE / "moto_walkthrough.ipynb", as_version=4)


def test_file_notebook_and_tests_have_the_same_equations(notebook):
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    numbers = lambda pattern, text: [int(n) for n in re.findall(pattern, text, re.M)]
    headings = numbers(r"^## Eq (\d+) · \S", text)
    assert len(set(headings)) == len(headings)
    functions = numbers(r'"""Eq (\d+)', (HERE / "moto.py").read_text())
    tests = numbers(r"^def test_eq(\d+)_", (HERE / "test_moto.py").read_text())
    assert set(headings) == set(functions) == set(tests) == set(range(1, 17))


def test_the_notebook_shows_the_source_as_it_is_now(notebook):
    shown = 0
    for cell in notebook.cells:
        names = []
        if cell.cell_type == "code":
            names = re.findall(r"\bshow\(moto\.([\w.]+)\)", cell.source)
        outputs = [output["data"]["text/markdown"] for output in cell.get("outputs", [])
                   if "text/markdown" in output.get("data", {})]
        assert len(outputs) == len(names)
        for name, output in zip(names, outputs):
            thing = moto
            for part in name.split("."):
                thing = getattr(thing, part)
            source = f"```python\n{inspect.getsource(thing)}```"
            assert output == source, f"{name} has changed: execute the notebook again"
            shown += 1
    assert shown >= 16


def test_the_committed_notebook_ran_in_order_and_is_static_and_small(notebook):
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [o for cell in code for o in cell.outputs]
    assert not [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]
    kinds = {kind for o in outputs for kind in o.get("data", {})}
    assert kinds <= {"text/plain", "text/markdown", "image/png"}
    for cell in code:                # every picture that is drawn is there, Kitchen's included
        drawn = len(re.findall(r"^ *picture\(", cell.source, re.M))
        shown = [o for o in cell.outputs if "image/png" in o.get("data", {})]
        assert drawn == len(shown), cell.source
        assert all(len(o.metadata["image/png"]["alt"]) > 20 for o in shown)
    assert (HERE / "moto_walkthrough.ipynb").stat().st_size < 1.5e6


def test_the_notebook_runs(notebook):
    from nbclient import NotebookClient
    resources = {"metadata": {"path": HERE}}
    NotebookClient(copy.deepcopy(notebook), timeout=900, resources=resources).execute()
