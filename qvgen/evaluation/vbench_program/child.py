"""Runs in the user's environment and not in qvgen's: Python 3.8, the standard library and VBench's package are all it has.

    PYTHON child.py facts       {"python": ..., "vbench": version or null, ...} as the last line that is printed
    PYTHON child.py evaluate    the request as JSON on stdin; VBench writes FOLDER/DIMENSION_eval_results.json

A request is {"dimension", "info", "videos", "folder", "local"}: the list of prompts, the folder of videos named
PROMPT-NUMBER.mp4, the folder for results, and whether the package is to read weights from its cache alone.
The calls are those of vbench 0.1.5: ``VBench(device, full_info_dir, output_path).evaluate(videos_path, name,
dimension_list=[...], local=..., mode="vbench_standard")``.
"""

import json
import sys
from pathlib import Path

sys.path[:] = [place for place in sys.path if not place or Path(place).resolve() != Path(__file__).resolve().parent]

PACKAGES = ("vbench", "torch", "torchvision", "numpy", "transformers", "detectron2")


def facts():
    """Versions of what the environment has, without importing any of it; null: it is not there."""
    from importlib.metadata import PackageNotFoundError, version
    from importlib.util import find_spec

    found = {"python": "{}.{}.{}".format(*sys.version_info[:3])}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None if find_spec(name) is None else "unknown"
    return found


def device():
    """The device that VBench computes on."""
    try:
        import torch
    except ImportError:
        return "cpu"
    return "cuda" if torch.cuda.is_available() else "cpu"


def evaluate(request):
    """Measure one dimension."""
    from vbench import VBench

    program = VBench(device(), request["info"], request["folder"])
    name = request["dimension"]
    program.evaluate(
        videos_path=request["videos"], name=name, dimension_list=[name], local=request["local"], mode="vbench_standard"
    )


if __name__ == "__main__":
    if sys.argv[1] == "facts":
        sys.stdout.write("\n" + json.dumps(facts()) + "\n")
    else:
        evaluate(json.load(sys.stdin))
