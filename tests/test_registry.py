"""The registry: names, lazy built-ins, hints, duplicates, and an installed plugin found by name."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from medplib import registry as registry_module
from medplib.errors import InputError, UnknownNameError
from medplib.registry import EXPERTS, GATES, VISION_TOWERS, Registry, load_plugins


def make_part(**values):
    return values


def test_registered_part_is_built_by_name_with_the_given_arguments():
    parts = Registry("part")

    @parts.register("square")
    class Square:
        def __init__(self, side, color="red"):
            self.side, self.color = side, color

    made = parts.build("square", 3, color="blue")
    assert (type(made), made.side, made.color) == (Square, 3, "blue")
    assert parts.get("square") is Square
    assert "square" in parts
    assert "circle" not in parts


def test_unknown_name_gives_the_closest_name_and_all_known_ones():
    parts = Registry("expert")
    parts.register("swiglu")(make_part)
    parts.register("vesselness")(make_part)
    with pytest.raises(UnknownNameError) as error:
        parts.get("swigluu")
    assert str(error.value) == "No expert named 'swigluu'. Did you mean 'swiglu'? Known: swiglu, vesselness."
    assert isinstance(error.value, LookupError)


def test_unknown_name_without_a_close_one_lists_the_known_ones():
    parts = Registry("gate")
    parts.add_lazy("topk", "medplib.experts.router:TopKGate")
    with pytest.raises(UnknownNameError, match=r"^No gate named 'zzz'\. Known: topk\.$"):
        parts.get("zzz")


def test_taken_name_is_refused_unless_it_is_the_same_object():
    parts = Registry("part")
    parts.register("one")(make_part)
    parts.register("one")(make_part)
    with pytest.raises(InputError, match=r"'one' is taken by .*make_part"):
        parts.register("one")(dict)
    assert parts.get("one") is make_part


def test_lazy_name_accepts_the_object_it_points_at_and_no_other():
    parts = Registry("part")
    parts.add_lazy("made", f"{make_part.__module__}:make_part")
    parts.add_lazy("made", f"{make_part.__module__}:make_part")
    parts.register("made")(make_part)
    with pytest.raises(InputError, match="taken"):
        parts.add_lazy("made", "elsewhere:make_part")
    with pytest.raises(InputError, match="taken"):
        parts.register("made")(dict)


def test_lazy_part_is_imported_only_when_it_is_asked_for(tmp_path, monkeypatch):
    (tmp_path / "late_part.py").write_text("class Late:\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    parts = Registry("part")
    parts.add_lazy("late", "late_part:Late")
    assert parts.names() == ["late"]
    assert "late" in parts
    assert "late_part" not in sys.modules
    assert parts.get("late").__name__ == "Late"
    monkeypatch.delitem(sys.modules, "late_part")


def test_lazy_target_without_the_attribute_says_so():
    parts = Registry("part")
    parts.add_lazy("gone", "medplib.errors:Nothing")
    with pytest.raises(ImportError, match=r"medplib\.errors has no 'Nothing'"):
        parts.get("gone")


@pytest.mark.parametrize("name", ["", " swiglu", 3, dict])
def test_name_must_be_a_text(name):
    with pytest.raises(InputError, match="registered under a name"):
        Registry("part").register(name)


def test_asking_with_something_else_than_a_text_is_an_input_error():
    with pytest.raises(InputError, match="asked for by its name"):
        Registry("part").get(3)


def test_only_classes_and_functions_are_parts():
    with pytest.raises(InputError, match="must be a class or a function"):
        Registry("part").register("number")(3)


def test_built_in_names_are_listed_in_order():
    assert EXPERTS.names() == sorted(EXPERTS.names())
    assert {"swiglu", "gelu"} <= set(EXPERTS.names())
    assert "topk" in GATES
    assert {"clip", "timm", "timm_pyramid", "sam_vit"} <= set(VISION_TOWERS.names())


def write_plugin(folder: Path, name: str, entry: str, source: str) -> None:
    """What pip would have installed: a module beside a .dist-info with its entry point."""
    (folder / f"{name}.py").write_text(textwrap.dedent(source))
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[medplib.plugins]\n{name} = {entry}\n")


VESSELNESS = """
    from torch import nn
    from medplib.registry import EXPERTS

    @EXPERTS.register("vesselness")
    class VesselExpert(nn.Module):
        def __init__(self, dim, hidden_dim):
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(dim, hidden_dim), nn.Tanh(), nn.Linear(hidden_dim, dim))

        def forward(self, x):
            return self.layers(x)
"""


def test_installed_plugin_is_found_by_name_in_a_fresh_interpreter(tmp_path):
    write_plugin(tmp_path, "vessel_plugin", "vessel_plugin", VESSELNESS)
    script = """
        import sys
        from medplib import EXPERTS, MoERouter
        assert "vessel_plugin" not in sys.modules
        import torch
        router = MoERouter(8, experts=2, expert="vesselness", hidden_dim=4)
        assert {type(expert).__name__ for expert in router.experts.values()} == {"VesselExpert"}
        assert router(torch.randn(2, 3, 8)).shape == (2, 3, 8)
        assert EXPERTS.names() == ["gelu", "swiglu", "vesselness"]
        print("found")
    """
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "found\n"


@pytest.fixture
def plugin_folder(tmp_path, monkeypatch):
    """A folder on the path for plugins; what they register is forgotten afterwards."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(registry_module, "_plugins_tried", set())
    monkeypatch.setattr(registry_module, "_plugins_failed", {})
    monkeypatch.setattr(EXPERTS, "_entries", dict(EXPERTS._entries))
    yield tmp_path
    for name in [name for name in sys.modules if name.startswith("plugin_")]:
        del sys.modules[name]


def test_plugin_entry_point_may_be_a_function_and_runs_once(plugin_folder):
    source = """
        from medplib.registry import EXPERTS
        calls = []

        def register_parts():
            calls.append(1)
            EXPERTS.names()  # a plugin may look at the registry
            EXPERTS.register("by_function")(dict)
    """
    write_plugin(plugin_folder, "plugin_function", "plugin_function:register_parts", source)
    assert EXPERTS.build("by_function", side=3) == {"side": 3}
    load_plugins()
    assert sys.modules["plugin_function"].calls == [1]


def test_plugin_installed_later_is_found_without_a_restart(plugin_folder):
    assert "by_import" not in EXPERTS
    source = "from medplib.registry import EXPERTS\nEXPERTS.register('by_import')(dict)\n"
    write_plugin(plugin_folder, "plugin_later", "plugin_later", source)
    assert "by_import" in EXPERTS


def test_broken_plugin_warns_and_is_named_in_the_error(plugin_folder):
    write_plugin(plugin_folder, "plugin_broken", "plugin_broken", "raise ValueError('no licence')\n")
    with pytest.warns(RuntimeWarning, match="plugin_broken .*no licence"):
        assert "swiglu" in EXPERTS.names()
    with pytest.raises(
        UnknownNameError, match=r"plugin_broken .* could not be loaded \(ValueError: no licence\)"
    ):
        EXPERTS.get("brain")


def test_plugin_cannot_take_a_built_in_name(plugin_folder):
    source = "from medplib.registry import EXPERTS\nEXPERTS.register('swiglu')(dict)\n"
    write_plugin(plugin_folder, "plugin_thief", "plugin_thief", source)
    with pytest.warns(RuntimeWarning, match="'swiglu' is taken"):
        load_plugins()
    assert EXPERTS.get("swiglu").__name__ == "SwiGLU"


def test_the_same_class_defined_again_takes_its_place_but_lambdas_do_not():
    parts = Registry("part")
    cell = {"__name__": "notebook", "register": parts.register}
    for width in (1, 2):  # a cell that is run twice
        exec(f"@register('mine')\nclass Mine:\n    width = {width}", cell)
    assert parts.get("mine").width == 2
    parts.register("quick")(lambda: 1)
    with pytest.raises(InputError, match="'quick' is taken"):
        parts.register("quick")(lambda: 2)


def test_a_lazy_target_must_be_text():
    with pytest.raises(InputError, match="needs a target 'module:attribute', got None"):
        Registry("part").add_lazy("one", None)


def test_a_plugin_that_exits_is_left_out(plugin_folder):
    write_plugin(plugin_folder, "plugin_exits", "plugin_exits", "raise SystemExit(3)\n")
    with pytest.warns(RuntimeWarning, match=r"plugin_exits .* left out: SystemExit: 3"):
        assert "swiglu" in EXPERTS.names()
