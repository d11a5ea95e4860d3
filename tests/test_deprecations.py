"""A deprecation fails a test where we would have to change, and only there."""

import subprocess
import warnings

import pytest

import deprecations
from conftest import command_line

OURS = ["trunkline", "trunkline.engine.foreign.patch", "__main__", "test_patch", "conftest", "foreign_models"]
THEIRS = ["torch.nn.modules.module", "transformers.utils.generic", "trunklines", "my_conftest", "a.test_patch"]


def warn(module: str, kind: type[Warning]) -> None:
    exec("import warnings; warnings.warn('old', kind, stacklevel=1)", {"__name__": module, "kind": kind})


@pytest.fixture(params=["pytest", "program"])
def filters(request: pytest.FixtureRequest) -> None:
    if request.param == "program":  # pytest puts back what it had
        warnings.resetwarnings()
        deprecations.raise_ours()


@pytest.mark.parametrize("kind", deprecations.KINDS)
@pytest.mark.parametrize("module", OURS)
def test_ours_is_an_error(module, kind, filters):
    with pytest.raises(kind, match="old"):
        warn(module, kind)


@pytest.mark.parametrize("kind", deprecations.KINDS)
@pytest.mark.parametrize("module", THEIRS)
def test_that_of_others_is_shown(module, kind, filters):
    with warnings.catch_warnings(record=True) as shown:
        warn(module, kind)
    assert [(type(warning.message), str(warning.message)) for warning in shown] == [(kind, "old")]


@pytest.mark.parametrize("module", THEIRS)
def test_other_warnings_of_others_are_errors(module, filters):
    with pytest.raises(UserWarning, match="old"):
        warn(module, UserWarning)


@pytest.mark.parametrize(("file", "code"), [("mine.py", 1), ("theirs.py", 0)])
def test_command_has_the_filters(file, code, tmp_path):
    (tmp_path / "theirs.py").touch()
    (tmp_path / "mine.py").write_text("import theirs")
    with (tmp_path / file).open("a") as lines:
        lines.write("\nimport warnings; warnings.warn('old', FutureWarning)")
    program, environment = command_line()
    program[-1] = program[-1].replace("trunkline", "mine")
    result = subprocess.run(program, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == code, result.stderr
    assert "FutureWarning: old" in result.stderr
