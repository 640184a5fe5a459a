"""What a checkpoint's files hold is read as it was written, bit by bit, or refused; nothing else is in them."""

import copy
import io
import pickle
import random

import numpy as np
import pytest
import timm.optim
import torch
from safetensors.torch import save_file
from torch import nn

from timm_cbam2.errors import UserError
from timm_cbam2.training.checkpoint import Position
from timm_cbam2.training.snapshot import check_shapes
from timm_cbam2.training.states import read_state, refuse_code, write_state


def same(one, other):
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and one.stride() == other.stride() and torch.equal(one, other)
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and (one == other).all()
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return type(one) is type(other) and len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and (one == other or one != one and other != other)


def test_read_as_written(tmp_path):
    whole = torch.randn(2, 3, 4, 5)
    state = {
        "numbers": [1, -(2**70), 0.1, float("inf"), float("nan"), True, None, "text\n\x00"],
        7: {"nested": ((), [], {}, (1, [2, {3: 4}]))},
        "tensors": [whole, whole.to(memory_format=torch.channels_last), whole.transpose(1, 3), whole[0], whole[:, 1]],
        "kinds": [torch.tensor(3), torch.zeros(0, 2), torch.arange(3, dtype=torch.uint8), torch.ones(2).bfloat16()],
        "generators": (random.getstate(), np.random.get_state(), torch.get_rng_state()),
    }
    write_state(state, tmp_path / "state.safetensors")
    again = read_state(tmp_path / "state.safetensors")
    state["tensors"][2:] = [value.contiguous() if i > 0 else value for i, value in enumerate(state["tensors"][2:])]
    assert same(state, again)
    assert again["tensors"][1].is_contiguous(memory_format=torch.channels_last)
    for foreign in ({"a": object()}, {"a": {1.5: 2}}, [b"bytes"]):
        with pytest.raises(TypeError, match="cannot hold"):
            write_state(foreign, tmp_path / "foreign.safetensors")


@pytest.mark.parametrize("content", ["missing", "pickle", "cut", "other", "nested", "lost tensor", "kind"])
def test_refused(tmp_path, content):
    file = tmp_path / "state.safetensors"
    trees = {"nested": "[" * 100_000, "lost tensor": '{"tensor": "b"}', "kind": '{"run": "me"}'}
    if content == "pickle":
        file.write_bytes(pickle.dumps({"a": 1}))
    elif content != "missing":
        metadata = {"timm_cbam2": trees[content]} if content in trees else None
        save_file({"a": torch.zeros(9)}, file, metadata=metadata)
        if content == "cut":
            file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(UserError, match="state.safetensors holds no state of a run"):
        read_state(file)


# Of each family of timm's one; those that compile their step (kron) take minutes here.
OPTIMIZERS = (
    *("sgd", "momentum", "adam", "adamw", "nadamw", "radam", "adamax", "adagrad", "adadelta", "adafactor", "adopt"),
    *("adafactorbv", "adabelief", "adamp", "lamb", "lars", "lion", "madgrad", "mars", "muon", "novograd", "rmsprop"),
    *("rmsproptf", "laprop", "lookahead_adamw", "cadamw"),
)


def test_the_optimizers_of_timm(tmp_path):
    """Two steps, a file, a third step: the same as three steps; and no shape is taken for a wrong one."""
    tried = 0
    for name in OPTIMIZERS:
        torch.manual_seed(0)
        network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 2))
        images = torch.randn(5, 2, 3, 4, 4)

        def step(network, optimizer, images):
            optimizer.zero_grad()
            network(images).square().mean().backward()
            optimizer.step()

        try:
            optimizer = timm.optim.create_optimizer_v2(network, opt=name, lr=1e-3)
            step(network, optimizer, images[0])
        except (AssertionError, ImportError, NameError, RuntimeError, TypeError, ValueError):
            continue  # it needs a package, a GPU or more arguments: refused before a run begins
        step(network, optimizer, images[1])
        other = copy.deepcopy(network)
        write_state(optimizer.state_dict(), tmp_path / f"{name}.safetensors")
        resumed = timm.optim.create_optimizer_v2(other, opt=name, lr=1e-3)
        resumed.load_state_dict(read_state(tmp_path / f"{name}.safetensors"))
        check_shapes(resumed)
        torch.manual_seed(1)
        step(network, optimizer, images[2])
        torch.manual_seed(1)
        step(other, resumed, images[2])
        assert all(torch.equal(a, b) for a, b in zip(network.parameters(), other.parameters())), name
        tried += 1
    assert tried > 20, tried


def test_an_optimizer_of_other_shapes():
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(3, 2))])
    optimizer.param_groups[0]["params"][0].grad = torch.ones(3, 2)
    optimizer.step()
    check_shapes(optimizer)
    optimizer.state[optimizer.param_groups[0]["params"][0]]["exp_avg"] = torch.zeros(2, 2)
    with pytest.raises(ValueError, match=r"exp_avg has shape \(2, 2\)"):
        check_shapes(optimizer)


ROW = dict.fromkeys(
    ("epoch", "step", "lr", "train_loss", "train_accuracy", "val_loss", "val_accuracy", "images_per_second"), 1.0
)


@pytest.mark.parametrize(
    "name, value",
    [
        *(("epoch", value) for value in (0, -1, 1.5, "1", None, True)),
        *(("batch", -1), ("updates", [1]), ("waited", None), ("sums", torch.zeros(2)), ("confusion", [[1]])),
        *(("rows", {}), ("rows", [{}]), ("rows", [{**ROW, "lr": "x"}]), ("best", ROW), ("bad", {"val": ["x"]})),
        *(("bad", []), ("streams", {})),
    ],
)
def test_a_position_that_is_none(name, value):
    state = Position().state_dict()
    Position().load_state_dict(state)
    with pytest.raises(ValueError, match=name):
        Position().load_state_dict({**state, name: value})
    with pytest.raises(ValueError, match="it tells"):
        Position().load_state_dict({key: value for key, value in state.items() if key != name})


def test_what_deepspeed_would_unpickle(tmp_path):
    """Tensors and numbers pass; whatever could run, or cannot be looked through, does not."""

    class Evil:
        def __reduce__(self):
            return (print, ("ran",))

    good = tmp_path / "good"
    good.mkdir()
    torch.save({"weights": torch.zeros(3), "step": 1, "shape": torch.Size([3])}, good / "mp_rank_00_model_states.pt")
    refuse_code(good)
    plain, old = io.BytesIO(), io.BytesIO()
    pickle.dump(Evil(), plain)
    torch.save({"a": torch.zeros(1)}, old, _use_new_zipfile_serialization=False)
    whole = io.BytesIO()
    torch.save({"a": Evil()}, whole)
    for number, content in enumerate((plain.getvalue(), old.getvalue(), whole.getvalue(), b"text", b"")):
        folder = tmp_path / f"bad{number}"
        folder.mkdir()
        (folder / "zero_pp_rank_0_mp_rank_00_optim_states.pt").write_bytes(content)
        with pytest.raises(UserError, match="could run code"):
            refuse_code(folder)
    with pytest.raises(UserError, match="is missing"):
        refuse_code(tmp_path / "none")
