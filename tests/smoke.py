"""`python tests/smoke.py`, run by .ci/run from another directory, in an environment that has the wheel and nothing of
the checkout: the README's first program, with what is installed."""

import importlib.metadata
import importlib.resources
import pathlib
import re


def main() -> None:
    import jaxsparse as js

    root = pathlib.Path(__file__).resolve().parents[1]
    assert root not in pathlib.Path(js.__file__).resolve().parents, f"{js.__file__} is not of the wheel"
    assert importlib.metadata.version("jaxsparse") == js.__version__
    assert importlib.resources.files("jaxsparse").joinpath("py.typed").is_file()
    cell = re.findall(r"```python\n(.*?)```", (root / "README.md").read_text(), re.DOTALL)[0]
    names: dict = {}
    exec(compile(cell, "README.md", "exec"), names)
    print(f"jaxsparse {js.__version__} in {pathlib.Path(js.__file__).parent}: loss {names['loss']:.4f}")
    assert 0 < names["loss"] < 1


if __name__ == "__main__":
    main()
