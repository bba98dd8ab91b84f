"""Every published name is here and takes every call that the published one takes."""

import enum
import importlib
import inspect
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from guided_diffusion import gaussian_diffusion as gd
from guided_diffusion import image_datasets, respace, script_util

API = json.loads((Path(__file__).parent / "reference" / "api.json").read_text())
NAMES = [(module, name) for module in API for name in API[module]]
REQUIRED = inspect.Parameter.empty

# The published ones hand (*args, **kwargs) on to the parent; here they are the parent's.
INHERITED = {
    f"SpacedDiffusion.{name}"
    for name in ("p_mean_variance", "training_losses", "condition_mean", "condition_score")
}


def plain(default):
    """Bring a default to what JSON holds."""
    return list(default) if isinstance(default, tuple) else default


def parameters(function):
    """Return [(name, kind, default or REQUIRED)] of a callable."""
    found = inspect.signature(function).parameters.values()
    return [(p.name, p.kind.name, plain(p.default)) for p in found]


def expected_parameters(entry):
    return [(p["name"], p["kind"], p.get("default", REQUIRED)) for p in entry]


def split(params):
    """Return the parameters that have a place, those by keyword alone, and the stars."""
    placed = [p for p in params if p[1] in ("POSITIONAL_ONLY", "POSITIONAL_OR_KEYWORD")]
    keyword = [p for p in params if p[1] == "KEYWORD_ONLY"]
    return placed, keyword, [p for p in params if p[1].startswith("VAR_")]


def check_call(label, function, entry):
    """Assert that `function` takes what `entry` of api.json takes, and needs nothing else."""
    placed, keyword, stars = split(parameters(function))
    wanted, wanted_keyword, wanted_stars = split(expected_parameters(entry))
    added = placed[len(wanted) :] + [p for p in keyword if p not in wanted_keyword]
    assert placed[: len(wanted)] == wanted, label
    assert set(wanted_keyword) <= set(keyword), label
    if label in INHERITED:
        assert len(placed) > len(wanted), label  # *args stood for these
        return
    assert {kind for _, kind, _ in wanted_stars} <= {kind for _, kind, _ in stars}, label
    assert all(default is not REQUIRED for _, _, default in added), (label, added)
    if any(kind == "VAR_POSITIONAL" for _, kind, _ in wanted_stars):
        assert len(placed) == len(wanted), label  # another would swallow one of *args


def check_class(name, cls, entry):
    missing = set(entry["bases"]) - {base.__name__ for base in cls.__mro__}
    assert not missing, (name, missing)
    for method, params in entry["methods"].items():
        check_call(f"{name}.{method}", getattr(cls, method), params)


@pytest.mark.parametrize("module, name", NAMES, ids=map(".".join, NAMES))
def test_published_names_take_published_calls(module, name):
    """A published name keeps its parameters by name, order, kind and default; new ones follow."""
    entry = API[module][name]
    found = getattr(importlib.import_module(f"guided_diffusion.{module}"), name)
    if entry["kind"] == "constant":
        assert found == entry["value"]
    elif entry["kind"] == "enum":
        assert issubclass(found, enum.Enum)
        assert [member.name for member in found] == entry["members"]
    elif entry["kind"] == "class":
        check_class(name, found, entry)
    else:
        check_call(name, found, entry["params"])


def test_published_constructors_take_the_published_dictionaries():
    """create_X(**X_defaults()) needs no other argument, and leaves none of the dictionary over."""
    pairs = [
        (script_util.create_model_and_diffusion, script_util.model_and_diffusion_defaults),
        (script_util.sr_create_model_and_diffusion, script_util.sr_model_and_diffusion_defaults),
        (script_util.create_classifier, script_util.classifier_defaults),
        (
            script_util.create_classifier_and_diffusion,
            script_util.classifier_and_diffusion_defaults,
        ),
    ]
    for create, defaults in pairs:
        assert set(inspect.signature(create).parameters) == set(defaults())
        inspect.signature(create).bind(**defaults())


def make_process(respacing="4"):
    return script_util.create_gaussian_diffusion(
        steps=20, noise_schedule="cosine", timestep_respacing=respacing
    )


def test_private_names_that_programs_use_are_here(tmp_path):
    """Programs call some names with an underscore; those keep their arguments and results."""
    values = gd._extract_into_tensor(np.array([1.0, 2.0]), torch.tensor([1, 0]), (2, 1, 3, 3))
    assert values.shape == (2, 1, 3, 3) and values[:, 0, 0, 0].tolist() == [2, 1]
    (tmp_path / "a.png").touch()
    assert image_datasets._list_image_files_recursively(str(tmp_path)) == [str(tmp_path / "a.png")]
    process = make_process()
    wrapped = process._wrap_model(lambda x, t: t)
    assert isinstance(wrapped, respace._WrappedModel)
    assert isinstance(process.timestep_map, list)
    assert wrapped(None, torch.arange(4)).tolist() == process.timestep_map


@pytest.mark.parametrize("respacing", ["", "4"])
def test_tables_are_float64_arrays(respacing):
    """The tables of a process are float64 numpy arrays, one entry per step."""
    process = make_process(respacing)
    for name in (
        "betas", "alphas_cumprod", "alphas_cumprod_prev", "alphas_cumprod_next",
        "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod", "log_one_minus_alphas_cumprod",
        "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod", "posterior_variance",
        "posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2",
    ):  # fmt: skip
        table = getattr(process, name)
        assert isinstance(table, np.ndarray) and table.dtype == np.float64, name
        assert table.shape == (process.num_timesteps,), name
