"""MoERouter against recorded mixture layers of the published implementation, where it dropped no token."""

import pytest
import torch

from medplib import ops
from medplib.experts import MoERouter, SwiGLU, collect_aux_losses


def published_layers(recorded):
    """The recorded top-1 layers and their runs without drops (the published drops are at random)."""
    for layer in recorded["layer"]:
        if layer["k"] == 1:
            for name, run in layer["runs"].items():
                if run["status"] == "ok" and not run["dropped"]:
                    yield layer, name, run


def load_layer(layer, tensors):
    """The layer with its recorded weights; None if it holds more than gate and experts (a residual one)."""
    router = MoERouter(layer["h"], {f"e{i}": SwiGLU(layer["h"], layer["i"]) for i in range(layer["E"])})
    prefix, state = f"{layer['tag']}.w.", {}
    for key, value in tensors.items():
        if key.startswith(prefix):
            name = key.removeprefix(prefix).replace("deepspeed_moe.", "").replace("gate.wg.", "gate.")
            state[name.replace("experts.deepspeed_experts.", "experts.e")] = value
    if set(state) != set(router.state_dict()):
        return None
    router.load_state_dict(state)
    return router


def test_output_loss_and_gradients_are_those_recorded(golden):
    recorded, tensors = golden("moe_gate/moe.json"), golden("moe_gate/moe.safetensors")
    compared = 0
    for layer, name, run in published_layers(recorded):
        router = load_layer(layer, tensors)
        if router is None:
            continue
        router.train(name.startswith("train"))
        x = tensors[f"{layer['tag']}.x"].clone().requires_grad_(True)
        with collect_aux_losses(router) as aux:
            out = router(x)
        (out.square().sum() + aux.balance()).backward()
        wanted = {key: tensors[f"{layer['tag']}.{name}.{key}"] for key in ("out", "grad_x", "grad_wg")}
        for got, key in ((out, "out"), (x.grad, "grad_x"), (router.gate.weight.grad, "grad_wg")):
            torch.testing.assert_close(
                got, wanted[key], atol=1e-4, rtol=1e-4, msg=lambda m, k=key: f"{k}: {m}"
            )
        assert aux.balance().item() == pytest.approx(run["l_aux"], abs=1e-5)
        compared += 1
    assert compared


def test_capacity_is_the_recorded_one(golden):
    for tokens, experts, factor, least, official, _ in golden("moe_gate/moe.json")["capacity_table"]:
        assert max(ops.capacity_of(tokens, experts, factor), least) == official
