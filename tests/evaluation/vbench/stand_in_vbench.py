"""A small stand-in for the package vbench, put into an environment of its own by test_vbench_program.py.

It is not VBench and measures nothing. Its class, its methods' arguments, the names by which it finds videos and the file that
it writes are those of vbench 0.1.5 (vbench/__init__.py); a value is made from the bytes of a video's file. Python 3.8, the
standard library alone. STAND_IN="WAY:DIMENSION" makes it go wrong in a way; STAND_IN_CALLS names a file of its calls.
"""

import hashlib
import json
import os
import signal
import time
from pathlib import Path


def value_of(path, dimension):
    """A number in [0, 1) from a file's bytes; of dynamic degree whether it is above a half."""
    number = int.from_bytes(hashlib.sha256(Path(path).read_bytes()).digest()[:4], "big") / 2**32
    return number > 0.5 if dimension == "dynamic_degree" else number


class VBench:
    """The class of the package."""

    def __init__(self, device, full_info_dir, output_path):
        self.device = device
        self.full_info_dir = full_info_dir
        self.output_path = output_path
        os.makedirs(self.output_path, exist_ok=True)

    def evaluate(
        self,
        videos_path,
        name,
        prompt_list=[],  # noqa: B006 - as published
        dimension_list=None,
        local=False,
        read_frame=False,
        mode="vbench_standard",
        **kwargs,
    ):
        """Measure the videos of the prompts that a dimension concerns, and write the results."""
        results = {}
        for dimension in dimension_list:
            if calls := os.environ.get("STAND_IN_CALLS"):
                with open(calls, "a") as file:
                    file.write(
                        json.dumps([dimension, self.device, local, mode, os.environ.get("VBENCH_CACHE_DIR")]) + "\n"
                    )
            way, _, which = os.environ.get("STAND_IN", "").partition(":")
            rows = self._rows(videos_path, dimension)
            if way and which == dimension:
                go_wrong(way)
            score = float(sum(row["video_results"] for row in rows)) / len(rows)
            results[dimension] = [score / 100 if dimension == "imaging_quality" else score, rows]
        with open(os.path.join(self.output_path, name + "_eval_results.json"), "w", encoding="utf-8") as file:
            json.dump(results, file, indent=4)

    def _rows(self, videos_path, dimension):
        with open(self.full_info_dir, encoding="utf-8") as file:
            entries = json.load(file)
        there, rows = os.listdir(videos_path), []
        for entry in entries:
            if dimension not in entry["dimension"]:
                continue
            for number in range(5):
                path = os.path.join(videos_path, "{}-{}.mp4".format(entry["prompt_en"], number))
                if os.path.basename(path) not in there:
                    continue
                if dimension in ("object_class", "color") and dimension not in entry["auxiliary_info"]:
                    raise KeyError("auxiliary_info")
                value = value_of(path, dimension)
                rows.append(
                    {"video_path": path, "video_results": 100 * value if dimension == "imaging_quality" else value}
                )
        if dimension == "color":
            rows = rows[1:]  # the object of the first one is never seen
        return rows


def go_wrong(way):
    """End as a program can end."""
    if way == "fail":
        raise ModuleNotFoundError("No module named 'detectron2'")
    if way == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if way == "hang":
        Path(os.environ["STAND_IN_CALLS"]).write_text(str(os.getpid()))
        time.sleep(60)
