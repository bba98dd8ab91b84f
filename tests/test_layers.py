"""The files of the package stand in layers: each builds on those before it, on none after."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "guided_diffusion"

# A file imports only files that stand before it, also within its functions.
ORDER = """
    nn losses schedules streams launchers signs heartbeat weight_files dist_util log_outputs
    logger sharding compiling fp16_util blocks unet image_decoding npz_rows data_sources
    class_labels image_order image_batches image_datasets resample tables sampling
    gaussian_diffusion respace noise_levels guidance solvers solver_sampling flag_checks
    checkpoints downloads checkpoint_sets signals flag_parsing presets sampling_flags config
    infer_flags trained_flags script_util samplers metering estimates pictures progress
    reporting train_state parallel train_files validation train_util training sample_labels
    base_samples sample_files sample_util inpainting given_images
""".split()  # noqa: SIM905 - as a picture


def imported_files(source):
    """Return the files of the package that a source text imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            start = "guided_diffusion" if node.level else ""
            module = ".".join(filter(None, [start, node.module]))
            found |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    names = {name.split(".")[1] for name in found if name.startswith("guided_diffusion.")}
    return names & {path.stem for path in PACKAGE.glob("*.py")}


def test_the_order_names_every_file():
    """A new file must be given its place in the order."""
    assert {path.stem for path in PACKAGE.glob("*.py")} == {*ORDER, "__init__"}
    assert len(set(ORDER)) == len(ORDER)


@pytest.mark.parametrize("name", ORDER)
def test_a_file_imports_only_files_before_it(name):
    """No file imports itself or one that stands later in the order."""
    before = set(ORDER[: ORDER.index(name)])
    assert imported_files((PACKAGE / f"{name}.py").read_text()) <= before


def test_imports_of_every_form_are_seen():
    """The reader of imports knows all five ways to import a file of the package."""
    source = (
        "import guided_diffusion.nn\nfrom . import config\n"
        "def f():\n    from .unet import UNetModel\n    from guided_diffusion import logger\n"
        "    from guided_diffusion.losses import normal_kl\n"
    )
    assert imported_files(source) == {"nn", "config", "unet", "logger", "losses"}


def test_importing_the_flags_imports_nothing_heavy():
    """config.py, and with it --help, needs neither torch nor numpy nor Pillow."""
    code = "import sys, guided_diffusion.config; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PACKAGE.parent
    )
    assert "guided_diffusion.config" in done.stdout.split()
    assert not {"torch", "numpy", "PIL", "blobfile", "mpi4py"} & set(done.stdout.split())
