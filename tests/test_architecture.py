"""What the README says about the code itself, kept by reading the code: layers, no code from data, no foreign system.

Nothing is imported or run: the checks parse the sources, so that code on any path counts.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "adflow"
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(PACKAGE.rglob("*.py"))}

# Plumbing lies in the layer of the lowest public module that uses it.
PLUMBING = {
    "cli": ["__main__"],
    "tasks": ["_card"],
    "pipeline": ["bundle", "runs"],
    "report": ["_page", "_table", "published"],
    "data": ["_lite", "_streamline", "_threads", "_weights"],
    "calibration": ["_health"],
    "detector": ["_extract", "_reduce", "_rows"],
    "flows": ["_encoding", "_fused", "_originals", "_subnets"],
    "overlays": ["_drawing"],
    "zoo": ["_catalogue", "_files", "_lock", "_store", "_unpack"],
    "imaging": ["_bytes", "_clock", "_maxtree", "_nets", "_nfa_block", "_ranks", "_regions", "_system", "_video"],
}


def layers(text: str) -> list[list[str]]:
    """The layers named in a document, highest first, with their plumbing."""
    found = re.search(r"Imports point down only: `([^`]+)`", " ".join(text.split()))
    assert found, "the sentence that names the layers is gone"
    named = [part.split() for part in found[1].split("|")]
    return [names + [extra for name in names for extra in PLUMBING.get(name, [])] for names in named]


def imported(tree: ast.AST) -> Iterator[tuple[list[str], int]]:
    """(dotted name below adflow, line) of every import that loads something, inside functions too."""
    annotations_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in annotations_only:
            continue
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in line {node.lineno}: write the whole name"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for name in names:
            if name.startswith("adflow."):
                yield name.split(".")[1:], node.lineno


def upward(path: Path, tree: ast.AST, rank: dict[str, int]) -> Iterator[str]:
    """What the layers forbid in one source file."""
    parts = list(path.relative_to(PACKAGE).with_suffix("").parts)
    for target, line in imported(tree):
        where = f"{path.relative_to(ROOT)}:{line}"
        if target[0] in rank and rank[target[0]] < rank[parts[0]]:
            yield f"{where} imports {target[0]} from a layer above"
        if parts[0] == "methods" and parts[1:] != ["__init__"]:
            public = target[0] == "methods" and len(target) > 1 and not target[1].startswith("_")
            if public or target[0] in ("data", "zoo", "fetch"):
                yield f"{where} imports {'.'.join(target)}: methods know neither each other nor where data come from"


def rank_of() -> dict[str, int]:
    found = layers((ROOT / "README.md").read_text(encoding="utf-8"))
    return {name: i for i, names in enumerate(found) for name in names}


def test_every_module_has_a_layer() -> None:
    rank = rank_of()
    own = {path.relative_to(PACKAGE).with_suffix("").parts[0] for path in TREES} - {"__init__"}
    assert own - set(rank) == set(), "name its layer in the README, or in PLUMBING above"
    assert set(rank) - own == set(), "no such module: the README or PLUMBING names too many"


def test_imports_point_down_only() -> None:
    rank = rank_of()
    wrong = [line for path, tree in TREES.items() if path.parent != PACKAGE or path.stem != "__init__"
             for line in upward(path, tree, rank)]  # fmt: skip
    assert wrong == []


def test_an_import_from_above_is_seen() -> None:
    rank = rank_of()
    tree = ast.parse("def f():\n    from adflow import tasks\n    from adflow.methods.padim import Padim\n")
    assert len(list(upward(PACKAGE / "imaging.py", tree, rank))) == 2
    assert len(list(upward(PACKAGE / "methods" / "spade.py", tree, rank))) == 2
    quiet = ast.parse("if TYPE_CHECKING:\n    from adflow import tasks\nfrom adflow import errors\n")
    assert list(upward(PACKAGE / "imaging.py", quiet, rank)) == []


# ---- no code from data

# Reached in any way: called, passed on, or imported by name.
FORBIDDEN = {
    "eval": "runs text",
    "exec": "runs text",
    "compile": "makes code of text",
    "__import__": "imports by a name",
    "pickle.load": "runs what a file says",
    "pickle.loads": "runs what a file says",
    "pickle.Unpickler": "runs what a file says",
    "dill": "runs what a file says",
    "joblib": "runs what a file says",
    "cloudpickle": "runs what a file says",
    "marshal": "reads code",
    "shelve": "is pickle",
    "runpy": "runs a file",
    "code.interact": "runs text",
    "os.system": "starts a shell",
    "os.popen": "starts a shell",
    "subprocess": "starts programs",
    "ctypes": "calls foreign code",
    "yaml.load_all": "builds any object",
    "yaml.unsafe_load": "builds any object",
    "yaml.full_load": "builds any object",
    "yaml.Loader": "builds any object",
    "yaml.FullLoader": "builds any object",
    "yaml.UnsafeLoader": "builds any object",
    "tempfile.mktemp": "names a file that another may make first",
    "zipfile.ZipFile.extractall": "trusts the archive's paths",
    "shutil.unpack_archive": "trusts the archive's paths",
    "xml.etree": "expands entities",
}
METHODS = {"extractall": "trusts the archive's paths", "extract": "trusts the archive's paths"}
# (call, keyword, value it must have)
MUST = [("torch.load", "weights_only", True), ("np.load", "allow_pickle", False), ("numpy.load", "allow_pickle", False)]


def dotted(node: ast.AST) -> str:
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return "?"


def code_from_data(tree: ast.AST) -> Iterator[str]:
    """What of a source could run what a file holds."""
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Name | ast.Attribute):
            names = [dotted(node)]
        for name in names:
            parts = name.split(".")
            for bad in {".".join(parts[: i + 1]) for i in range(len(parts))} & FORBIDDEN.keys():
                yield f"line {node.lineno}: {name} {FORBIDDEN[bad]}"
        if not isinstance(node, ast.Call):
            continue
        called = dotted(node.func)
        words = {k.arg: k.value.value for k in node.keywords if isinstance(k.value, ast.Constant)}
        for name, keyword, value in MUST:
            if called == name and words.get(keyword) is not value:
                yield f"line {node.lineno}: {name} without {keyword}={value}"
        if words.get("shell") or words.get("trust_remote_code"):
            yield f"line {node.lineno}: {called} runs what it is given"
        if isinstance(node.func, ast.Attribute) and node.func.attr in METHODS:
            yield f"line {node.lineno}: {node.func.attr} {METHODS[node.func.attr]}"
        if called == "yaml.load" and not (len(node.args) > 1 and "CSafeLoader" in ast.dump(node.args[1])):
            yield f"line {node.lineno}: yaml.load without the safe loader"


def test_nothing_in_the_package_runs_code_from_data() -> None:
    wrong = [f"{path.relative_to(ROOT)} {line}" for path, tree in TREES.items() for line in code_from_data(tree)]
    assert wrong == []


@pytest.mark.parametrize(
    "text",
    [
        "eval(x)", "map(eval, y)", "from pickle import loads", "pickle.load(f)", "import subprocess",
        "torch.load(p)", "torch.load(p, weights_only=False)", "np.load(p)", "np.load(p, allow_pickle=True)",
        "yaml.load(t, yaml.Loader)", "yaml.load(t)", "run(c, shell=True)", "tar.extractall(p)", "os.system(c)",
        "AutoModel.from_pretrained(n, trust_remote_code=True)", "import joblib.numpy_pickle",
    ],
)  # fmt: skip
def test_code_from_data_is_seen(text: str) -> None:
    assert list(code_from_data(ast.parse(text)))


@pytest.mark.parametrize(
    "text",
    ["torch.load(p, weights_only=True)", "net.eval()", "np.load(p, allow_pickle=False)", "re.compile(x)",
     'yaml.load(t, getattr(yaml, "CSafeLoader", yaml.SafeLoader))', "except pickle.UnpicklingError: pass"],
)  # fmt: skip
def test_what_is_safe_is_let_through(text: str) -> None:
    text = f"try: pass\n{text}" if text.startswith("except") else text
    assert list(code_from_data(ast.parse(text))) == []


# ---- Linux, macOS and Windows

# Not there on Windows, or only with special rights; sched_getaffinity is not there on macOS either.
ONE_SYSTEM = {
    "fcntl", "pwd", "grp", "resource", "termios", "tty", "pty", "syslog", "winreg", "msvcrt", "_winapi",
    "os.fork", "os.forkpty", "os.wait", "os.waitpid", "os.kill", "os.killpg", "os.getuid", "os.geteuid", "os.getgid",
    "os.getpgid", "os.setsid", "os.mkfifo", "os.mknod", "os.chown", "os.chroot", "os.nice", "os.uname", "os.statvfs",
    "os.sysconf", "os.symlink", "os.readlink", "os.link", "os.sched_getaffinity", "os.posix_fadvise", "os.pread",
    "os.sendfile", "os.memfd_create", "os.O_DIRECTORY", "os.O_NOFOLLOW", "os.O_TMPFILE",
    "signal.SIGKILL", "signal.SIGHUP", "signal.SIGQUIT", "signal.SIGALRM", "signal.SIGUSR1", "signal.alarm",
    "signal.setitimer", "signal.pause", "time.tzset", "multiprocessing.set_start_method",
    # These fork on Linux unless they are told otherwise; what is right for all systems is in tasks/_jobs.py.
    "concurrent.futures.ProcessPoolExecutor", "torch.multiprocessing", "torch.utils.data.DataLoader",
}  # fmt: skip
PATH_METHODS = {"symlink_to", "hardlink_to", "readlink", "lchmod", "group", "owner"}
ABSOLUTE = re.compile(r"^(/(tmp|proc|dev|var|etc|usr|home|root|sys)(/|$)|[A-Za-z]:\\)")


def guarded(tree: ast.AST) -> set[int]:
    """Nodes that run only where a test for the system, or for the name itself, has passed, or whose failure is met."""
    found: set[int] = set()
    for node in ast.walk(tree):
        test = getattr(node, "test", None)
        if isinstance(node, ast.If | ast.IfExp) and test is not None:
            words = ast.dump(test)
            if "platform" in words or "hasattr" in words or "id='os', ctx=Load()), attr='name'" in words:
                found |= {id(inner) for inner in ast.walk(node)}
        if isinstance(node, ast.Try) and any("OSError" in ast.dump(h.type) for h in node.handlers if h.type):
            found |= {id(inner) for part in node.body for inner in ast.walk(part)}
    return found


def one_system(tree: ast.AST) -> Iterator[str]:
    """What of a source works on one kind of operating system only."""
    safe = guarded(tree)
    for node in ast.walk(tree):
        if id(node) in safe:
            continue
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and ABSOLUTE.match(node.value):
            yield f"line {node.lineno}: the path {node.value}"
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Attribute):
            names = [dotted(node)]
        yield from (f"line {node.lineno}: {name}" for name in names if name in ONE_SYSTEM)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            if node.func.attr in PATH_METHODS:
                yield f"line {node.lineno}: {node.func.attr}"
            words = [a.value for a in node.args if isinstance(a, ast.Constant)]
            if node.func.attr == "get_context" and words != ["spawn"]:
                yield f"line {node.lineno}: processes that are forked, not spawned"
            if dotted(node.func) in ("multiprocessing.Process", "multiprocessing.Pool"):
                yield f"line {node.lineno}: the system's default way to start processes"


def test_no_call_of_one_operating_system_is_unguarded() -> None:
    wrong = [f"{path.relative_to(ROOT)} {line}" for path, tree in TREES.items() for line in one_system(tree)]
    assert wrong == []


@pytest.mark.parametrize(
    "text",
    ["import fcntl", "os.sched_getaffinity(0)", "from os import fork", "os.kill(p, signal.SIGKILL)", "a.symlink_to(b)",
     "open('/tmp/x')", "multiprocessing.get_context('fork')", "multiprocessing.get_context()", "open('/proc/meminfo')",
     "if x:\n    os.fork()", "from concurrent.futures import ProcessPoolExecutor",
     "torch.utils.data.DataLoader(data, num_workers=2)"],
)  # fmt: skip
def test_what_one_system_lacks_is_seen(text: str) -> None:
    assert list(one_system(ast.parse(text)))


def test_guards_are_understood() -> None:
    text = """
if sys.platform == "win32":
    import msvcrt
else:
    import fcntl
n = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
try:
    os.link(a, b)
except OSError:
    copy(a, b)
"""
    assert list(one_system(ast.parse(text))) == []


def test_files_are_opened_with_an_encoding() -> None:
    """Text is UTF-8 on every system: the default of Windows is not."""
    wrong = []
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call):
                continue
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            words = {k.arg for k in node.keywords}
            first = next((a.value for a in node.args if isinstance(a, ast.Constant)), "r")
            binary = name == "open" and isinstance(first, str) and "b" in first
            if name in ("read_text", "write_text") and isinstance(node.func, ast.Attribute):
                if "encoding" not in words and dotted(node.func) != "files.write_text":
                    wrong.append(f"{path.name}:{node.lineno} {name} without encoding")
            elif name == "open" and isinstance(node.func, ast.Name) and not binary and "encoding" not in words:
                wrong.append(f"{path.name}:{node.lineno} open without encoding")
    assert wrong == []
