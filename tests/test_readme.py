"""What the README says can be pasted."""

import re

import pytest
from launching import ROOT

from guided_diffusion import config

DOCS = (
    "README.md",
    "models/README.md",
    "datasets/README.md",
    "docs/sampling.md",
    "docs/editing.md",
    "docs/samplers.md",
    "docs/evaluation.md",
    "docs/performance.md",
    "evaluations/README.md",
)
FLAGS = {f.name for f in config.all_fields()}


def commands(name):
    """Return the lines of the blocks of shell in a document, continued lines joined."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / name).read_text(), re.DOTALL)
    return "\n".join(blocks).replace("\\\n", " ").splitlines()


@pytest.mark.parametrize("name", DOCS)
def test_variables_are_defined_before_they_are_used(name):
    """Each $NAME in a command was given a value in a line above it."""
    known = set()
    for line in commands(name):
        loops = set(re.findall(r"for (\w+) in", line))
        assert set(re.findall(r"\$(\w+)", line)) - loops <= known, line
        known |= loops | set(re.findall(r"^(\w+)=", line))


@pytest.mark.parametrize("name", DOCS)
def test_commands_name_scripts_and_flags_that_exist(name):
    """Each program is there, and each flag of a script is declared."""
    lines = [line for line in commands(name) if re.search(r"python \S+\.py", line)]
    assert lines
    for line in lines:
        program = re.search(r"python (\S+\.py)", line)[1]
        assert (ROOT / program).is_file(), line
        if program.startswith("scripts/"):
            assert set(re.findall(r"--(\w+)", line.partition(program)[2])) <= FLAGS, line
