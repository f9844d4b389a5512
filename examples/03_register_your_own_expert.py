"""An expert of your own: register it, name it in a mixture, put it into a trained model, train it alone."""

from pathlib import Path

import torch
from torch import Tensor, nn

from medplib import EXPERTS, MedPLIB, MoERouter, Stage, set_stage
from medplib.processing import Sample


@EXPERTS.register("sine")
class SineExpert(nn.Module):
    """down(sin(up(x))): (..., D) -> (..., D). Any module with this shape is an expert."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.up = nn.Linear(dim, hidden_dim)
        self.down = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.sin(self.up(x)))


# By name, wherever a mixture is built. An installed package does the same through the entry point group
# `medplib.plugins`, and then nothing needs to be imported first.
print("experts:", ", ".join(EXPERTS.names()))
router = MoERouter(128, experts=["left", "right"], expert="sine", hidden_dim=64)
print("router:", tuple(router(torch.randn(2, 7, 128)).shape))

# Into a trained model: its "vqa" experts give way; the gates and all else stay.
model = MedPLIB.from_pretrained("medplib-tiny")
for layer in model.language_model.get_decoder().layers:
    layer.mlp.experts["vqa"] = SineExpert(layer.mlp.dim, 64)

# Train these experts and nothing else, here on a single question.
print(set_stage(model, Stage("my expert", train=("experts.vqa",))))
image = Path(__file__).parent / "images" / "chest_ct.png"
lesson = Sample([image], [("What is this?", "This is a slice of a chest.")])
batch = model.processor([lesson], training=True).tensors
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
for step in range(20):
    loss = model(**batch).loss
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 19 == 0:
        print(f"step {step:2d}  loss {loss.item():.3f}")
