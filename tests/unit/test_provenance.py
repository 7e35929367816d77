"""Where results come from: the hash of the code changes when the code does, and only then."""

from __future__ import annotations

from pathlib import Path

import pytest

from block.core.paths import PACKAGE
from block.core.user_code import own_modules
from block.store.provenance import code_hash, source_hash

CODE = '"""Doc."""\n\ndef f(x):\n    """More."""\n    return x + 1  # why\n'


def hash_of(folder: Path, **files: str) -> str:
    for name, text in files.items():
        path = folder / (name.replace("__", "/") + ".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    code_hash.cache_clear()
    return code_hash(folder)


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ('"""Other."""\n\n\ndef f(x):\n    return (x + 1)\n', True),
        (CODE.replace("+ 1", "+ 2"), False),
        (CODE.replace("return x + 1", 'return "x"'), False),
    ],
)
def test_comments_docstrings_and_layout_are_not_code(tmp_path: Path, text: str, same: bool) -> None:
    assert (hash_of(tmp_path, engine=CODE) == hash_of(tmp_path, engine=text)) is same


def test_what_only_watches_is_no_part_of_it(tmp_path: Path) -> None:
    base = hash_of(tmp_path, engine=CODE)
    assert hash_of(tmp_path, run__console=CODE, gateway__app=CODE) == base
    assert hash_of(tmp_path, engine__batch=CODE) != base


def test_the_modules_of_one_s_own_are_found_by_what_they_import(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {
        "theirs/__init__.py": "",
        "theirs/one.py": "import numpy as np, json\nfrom . import two\nfrom .deep.three import thing\nimport flat",
        "theirs/two.py": "def late():\n    import theirs.four\n",
        "theirs/four.py": "import theirs.one",
        "theirs/five.py": "",
        "theirs/deep/three.py": "from ..six import *\nthing = 1",
        "theirs/six.py": "from block import policies",
        "flat.py": "",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    names = ["flat", "theirs", "theirs.deep.three", "theirs.four", "theirs.one", "theirs.six", "theirs.two"]
    found = own_modules("theirs.one")
    assert list(found) == names
    assert found["theirs.deep.three"] == tmp_path / "theirs" / "deep" / "three.py"
    installed = tmp_path / "site-packages"
    for name in ("plugin/__init__.py", "plugin/one.py", "plugin/two.py", "plugin/aside.py", "other.py"):
        (installed / name).parent.mkdir(parents=True, exist_ok=True)
        (installed / name).write_text("import other\nfrom . import two" if name == "plugin/one.py" else "")
    monkeypatch.syspath_prepend(str(installed))
    assert list(own_modules("plugin.one")) == ["plugin", "plugin.one", "plugin.two"]


def test_the_package_has_a_code_hash(tmp_path: Path) -> None:
    assert len(code_hash(PACKAGE)) == 16


def test_a_module_that_is_no_python_is_hashed_by_its_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of the user's may try to import another that is broken, and go on without it."""
    (tmp_path / "tries_broken.py").write_text("try:\n    import broken_module\nexcept SyntaxError:\n    pass\n")
    (tmp_path / "broken_module.py").write_text("def broken(:\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    found = own_modules("tries_broken")
    assert set(found) == {"tries_broken", "broken_module"}
    before = source_hash(found["broken_module"])
    found["broken_module"].write_text("def broken(::\n")
    assert source_hash(found["broken_module"]) != before
