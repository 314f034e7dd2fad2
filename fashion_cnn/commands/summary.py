"""Print what `make repro` has made, and what to do next."""

from ruamel.yaml import YAML

from fashion_cnn.commands.dvc_state import read_lock
from fashion_cnn.models.device import why_not_portable
from fashion_cnn.project.repository import LOCK, GitError, git

NEXT = """After `. .venv/bin/activate`:
  look         fashion-cnn page opens the CNNs of this run; metrics/figures/ has the pictures
  compare      fashion-cnn compare HEAD workspace, or fashion-cnn ui
  experiment   edit params.yaml and run `make repro`: only what the change affects reruns
  return       fashion-cnn back restores the committed params and results
  use          fashion-cnn predict docs/boot.png"""


def main() -> None:
    """Print how the results compare with the committed ones."""
    print(f"\n{compared(read_lock(), committed_lock())}\n{NEXT}")


def committed_lock() -> dict | None:
    """The dvc.lock of the last commit; None, after a line that says why, if git has none."""
    try:
        return YAML(typ="safe").load(git("show", f"HEAD:./{LOCK}"))
    except GitError as error:
        print(f"no committed results to compare with: {error}")
        return None


def compared(lock: dict, committed: dict | None) -> str:
    """In words: the same bytes, results of different inputs, or different results of the same inputs."""
    if committed is None:
        return "The pipeline is up to date."
    now, then = lock["stages"], committed["stages"]
    made = {out["path"] for stage in now.values() for out in stage["outs"]}
    if now.keys() != then.keys() or any(inputs(now[name], made) != inputs(then[name], made) for name in now):
        return "The results are those of your params and code, which differ from the committed ones."
    before = {(out["path"], out["md5"]) for stage in then.values() for out in stage["outs"]}
    outs = [(out["path"], out["md5"]) for stage in now.values() for out in stage["outs"]]
    different = [path for path, digest in outs if (path, digest) not in before]
    if not different:
        return "The results are the committed ones, byte for byte."
    reason = why_not_portable()
    expected = f"expected, because {reason}" if reason else "not expected on this CPU: please report it"
    return (
        f"{len(different)} of {len(outs)} outputs differ from the committed ones, the first of them "
        f"{different[0]}; that is {expected}.\n"
        "`fashion-cnn baseline` commits these results, so that later ones are compared with them."
    )


def inputs(stage: dict, made: set[str]) -> list:
    """A stage's inputs: its command, its params and the deps that no stage has made."""
    deps = [(dep["path"], dep["md5"]) for dep in stage.get("deps", []) if dep["path"] not in made]
    return [stage["cmd"], stage.get("params"), deps]
