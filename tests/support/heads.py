"""Heads on a vocabulary small enough to list all windows, and their laws by brute force, in float64."""

import itertools
import zlib
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mtp_jax.heads.circuits.transitions import STAY
from mtp_jax.heads.config import HeadConfig
from mtp_jax.language_model import LanguageModel
from mtp_jax.parameters import last_name
from mtp_jax.state import split
from support import tiny
from support.circuits import assignments

V, W, R, D, E = 4, 4, 3, 8, 3
WINDOWS_NW = np.array(list(itertools.product(range(V), repeat=W)), np.int32)


def make(seed=0, *, gate=1.0, values=None, **changes):
    """A model whose head has logits of size 1 and a gate of size `gate`. `values` replaces parameters by name.

    The numbers are numpy's, as compiling the random numbers of an initialisation takes longer than all the rest.
    """
    config = tiny.head_config(**{**dict(window=W, rank=R, factor_width=E), **changes})
    trunk = tiny.model_config(vocab_size=V, d_model=D, num_layers=1)
    model = jax.eval_shape(lambda: LanguageModel(trunk, config, rngs=nnx.Rngs(jax.random.key(0))))
    graph, state = nnx.split(model)

    def draw(path, leaf):
        name = path[-1].key
        fan_in = D if name.endswith("embed_VD") else leaf.shape[0]
        normal = np.random.default_rng([seed, *name.encode()]).standard_normal(leaf.shape)
        value = (values or {}).get(name, normal * (gate if name == "gate_DR" else 1) / np.sqrt(fan_in))
        if name == "listed_n":
            value = np.arange(len(normal))
        sharding = jax.NamedSharding(jax.sharding.get_mesh(), leaf.sharding.spec)
        return jax.device_put(np.reshape(value, leaf.shape).astype(leaf.dtype), sharding)

    return nnx.merge(graph, jax.tree.map_with_path(draw, nnx.to_pure_dict(state)))


def make_fresh(factors):
    """Models whose components begin as near copies, of rank 4, and by the same key, without noise, of rank 4 and 1."""
    trunk = tiny.model_config(vocab_size=64, d_model=64, num_layers=1)
    common = dict(factors=factors, factor_width=64, balance="none")
    configs = {
        "start": HeadConfig(**common, rank=4, init_noise=0.02),
        "equal": HeadConfig(**common, rank=4, init_noise=0.0),
        "single": HeadConfig(**common, rank=1, init_noise=0.0),
    }

    def build(key):
        return {name: LanguageModel(trunk, config, rngs=nnx.Rngs(key)) for name, config in configs.items()}

    # This generator compiles in a fifth of the default one's time. In pieces, as a user's program: in one piece the
    # compiler rounds the last bit of a number by the shape that it is drawn in.
    pieces = {"xla_cpu_parallel_codegen_split_count": 32}
    return SimpleNamespace(**jax.jit(build, compiler_options=pieces)(jax.random.key(0, impl="rbg")))


def wake(model):
    """Give values to the matrices of a head that begin as zero, and so without an effect."""
    graph, params = split(model)

    def fill(path, weight):
        name = last_name(path)
        if name == "listed_n" or np.asarray(weight).any():
            return weight
        key = jax.random.fold_in(jax.random.key(4), zlib.crc32(name.encode()))
        scale = 1.0 if name == "join_down_FD" else weight.shape[-2] ** -0.5
        return jax.device_put(scale * jax.random.normal(key, weight.shape), weight.sharding)

    return nnx.merge(graph, {**params, "head": jax.tree_util.tree_map_with_path(fill, params["head"])})


def parameters(model):
    """Parameters of the head and the vocabulary table by their name, without the module that holds them."""
    flat, _ = jax.tree.flatten_with_path(nnx.to_pure_dict(nnx.state(model)))
    return {
        path[-1].key: np.asarray(value) for path, value in flat if path[0].key == "head" or path[0].key == "unembed_VD"
    }


def seen(model, x_BTD):
    """What a head is given, of hidden states alone."""
    return model.seen(x_BTD, jnp.zeros_like(x_BTD[..., 0], jnp.int32))


def hidden(seed, *shape):
    """Hidden states of unit root mean square, as the trunk's final norm gives."""
    x = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True))


def make_targets(seed, batch, time, vocab=V, masked=True):
    """Random targets, and weights 1 / count over windows that end early, so that the offsets' counts differ."""
    rng = np.random.default_rng(seed)
    targets_BTW = rng.integers(0, vocab, (batch, time, W)).astype(np.int32)
    length_BT = rng.integers(0, W + 1, (batch, time)) if masked else np.full((batch, time), W)
    valid_BTW = np.arange(W) < length_BT[..., None]
    return targets_BTW, (valid_BTW / valid_BTW.sum((0, 1))).astype(np.float32)


def run(function, model, *arrays):
    """`function(model, *arrays)` compiled afresh, so that it sees what a test has patched, as numpy arrays."""
    compiled = jax.jit(lambda model, *arrays: function(model, *arrays))
    return jax.tree.map(np.asarray, compiled(model, *map(tiny.shard, arrays)))


def loss_of(model, *arrays):
    return run(lambda model, x_BTD, *rest: model.head.loss(seen(model, x_BTD), *rest), model, *arrays)


def log_softmax(z):
    z = z - z.max(axis=-1, keepdims=True)
    return z - np.log(np.exp(z).sum(axis=-1, keepdims=True))


def brute_logits(model, x_ND):
    """`[N, R, W, V]`, one factor after the other."""
    config, p = model.head.config, {name: value.astype(np.float64) for name, value in parameters(model).items()}

    def one(r, s):
        if config.factors == "full":
            return x_ND @ p["u_DRWV"][:, r, s]
        if config.factors == "shared":
            return x_ND @ p["map_DRWD"][:, r, s] @ p["unembed_VD"].T
        if config.factors == "residual":
            z_ND = x_ND @ p["residual_DRWD"][:, r, s]
            return (x_ND + z_ND / (1 + np.exp(-z_ND))) @ p["unembed_VD"].T
        if config.factors == "lora":
            return x_ND @ p["u_DWV"][:, s] + x_ND @ p["down_DRWE"][:, r, s] @ p["up_EV"]
        correction_VE = p["unembed_VD"] @ p["up_ED"].T
        return x_ND @ p["map_DWD"][:, s] @ p["unembed_VD"].T + x_ND @ p["down_DRWE"][:, r, s] @ correction_VE.T

    factors = [[one(r, s) for s in range(config.window)] for r in range(config.rank)]
    return np.moveaxis(np.array(factors), 2, 0)


def brute_law(model, x_ND):
    """The gate, the factors and the joint law `[N, V, V, V, V]` after each hidden state: a sum over all assignments of
    components to the nodes of the circuit."""
    x_ND, found = x_ND.astype(np.float64), parameters(model)
    gate_DR = found.get("gate_DR", np.zeros((x_ND.shape[-1], 1)))
    w_NR = np.exp(log_softmax(x_ND @ gate_DR))
    p_NRWV = np.exp(log_softmax(brute_logits(model, x_ND)))
    log_T = None
    if "trans_DMRR" in found:
        begin_RR = np.log((1 - STAY) * np.eye(R) + STAY / R)
        log_T = log_softmax(np.einsum("nd,dmij->nmij", x_ND, found["trans_DMRR"]) + begin_RR)
    log_weight_NA, component_AW = assignments(model.head.config.circuit, np.log(w_NR), log_T, W)
    each = [p_NRWV[:, component_AW[:, s], s] for s in range(W)]
    joint = np.einsum("na,nab,nac,nad,nae->nbcde", np.exp(log_weight_NA), *each, optimize=False)
    return SimpleNamespace(w_NR=w_NR, p_NRWV=p_NRWV, joint=joint)


def brute_conditionals(joint):
    """q(. | x_<s) for every window: `[N, V^W, W, V]`, by summing the joint law over what comes later."""
    laws = []
    for s in range(W):
        marginal = joint.sum(axis=tuple(range(s + 2, W + 1)))
        conditional = marginal / marginal.sum(axis=-1, keepdims=True)
        laws.append(conditional[(slice(None), *WINDOWS_NW[:, :s].T)] if s else np.repeat(conditional[:, None], V**W, 1))
    return np.stack(laws, axis=2)


def brute_posteriors(law):
    """Bayes: the components' probabilities given the first s tokens of every window, `[N, V^W, W + 1, R]`."""
    likelihoods = [law.p_NRWV[:, :, s, WINDOWS_NW[:, s]] for s in range(W)]
    joint = np.cumprod([np.repeat(law.w_NR[..., None], V**W, -1), *likelihoods], axis=0)
    return np.moveaxis(joint / joint.sum(axis=2, keepdims=True), (0, 1, 2, 3), (2, 0, 3, 1))
