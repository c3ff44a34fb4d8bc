"""The official files: read from a copy of the repository's ``data`` folder that the user has."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import countdown, travel_planning

#: which lengths exist for which task
LEVELS = {
    "html_to_tsv": ("0.5k", "2k", "8k"), "pseudo_to_code": ("0.5k", "2k"), "path_traversal": ("0.5k", "2k", "8k"),
    "tom_tracking": ("0.5k", "2k", "8k"), "countdown": ("0.5k", "2k", "8k"), "travel_planning": ("2k", "8k"),
}  # fmt: skip
#: estimated output tokens of the travel problems of a length; those between belong to none
_TRAVEL = {"2k": (0, 2048), "8k": (4096, 8192)}
#: HTML pages are megabytes at most
_LARGEST = 64 << 20


def split_name(name: str) -> tuple[str, str]:
    """("path_traversal", "0.5k") of "path_traversal_0.5k". Raises ValueError that names what there is."""
    task, _, level = name.rpartition("_")
    if task not in LEVELS:
        raise ValueError(f"there is no LongProc task '{name}': names are TASK_LEVEL with TASK one of {', '.join(LEVELS)}")
    if level not in LEVELS[task]:
        raise ValueError(f"{task} has no length '{level}': it comes in {', '.join(LEVELS[task])}")
    return task, level


def load_longproc(name: str, path: str | Path) -> list[dict[str, Any]]:
    """Rows with the three official fields (``input_prompt``, ``reference_output``, ``item``), for
    ``datasets.Dataset.from_list``.

    ``path``: the ``data`` folder of princeton-pli/LongProc. Prompts and reference traces come out character for character as
    the official loader makes them. Raises ValueError for an unknown name and files that are missing or damaged.
    """
    task, level = split_name(name)
    folder = Path(path) / task
    template = _prompt(folder / "prompts.yaml")
    file = folder / ("travel_planning_all.json" if task == "travel_planning" else f"{name}.json")
    try:
        if task in ("countdown", "travel_planning"):
            template = template.replace("{demonstration}", _escaped(_demonstrations(task, folder)))
        items = [_READERS[task](row, folder) for row in _json(file) if _belongs(row, task, level)]
        return [
            {"input_prompt": template.format(**item), "reference_output": item["reference_output"], "item": item}
            for item in items
        ]
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise ValueError(f"{file} is no file of LongProc: {type(error).__name__} {error}") from None


def _escaped(text: str) -> str:
    return text.replace("{", "{{").replace("}", "}}")


def _belongs(row: dict[str, Any], task: str, level: str) -> bool:
    if task != "travel_planning":
        return True
    low, high = _TRAVEL[level]
    return bool(low <= row["estimated_output_tokens"] < high)


def _text(file: Path) -> str:
    try:
        if file.stat().st_size > _LARGEST:
            raise ValueError(f"{file} is larger than {_LARGEST >> 20} MiB: no file of LongProc is")
        return file.read_text(encoding="utf-8")
    except OSError:
        raise ValueError(
            f"{file} is missing: clone princeton-pli/LongProc and give its data folder as path, or leave path out "
            "for generated items"
        ) from None
    except UnicodeDecodeError:
        raise ValueError(f"{file} is not UTF-8 text") from None


def _json(file: Path) -> list[dict[str, Any]]:
    try:
        rows = json.loads(_text(file))
    except (json.JSONDecodeError, RecursionError):
        raise ValueError(f"{file} is not JSON: fetch it again (large files of the repository may be cut)") from None
    if not isinstance(rows, list):
        raise ValueError(f"{file} is no list of items")
    return rows


def _prompt(file: Path) -> str:
    import yaml

    try:
        return str(yaml.safe_load(_text(file))["USER_PROMPT"])
    except (yaml.YAMLError, KeyError, TypeError):
        raise ValueError(f"{file} has no USER_PROMPT") from None


def _demonstrations(task: str, folder: Path) -> str:
    if task == "countdown":
        solved = [f"Numbers: {n}\nTarget: {t}\n\n{countdown.trace(n, t)}" for n, t in countdown.DEMONSTRATIONS]
    else:
        rows = _json(folder / "travel_planning_icl_examples.json")
        solved = [f"{row['disambig_question_text']}\n\n{travel_planning.trace(row)}" for row in rows]
    return "\n\n".join(f"# Example\n{text}" for text in solved)


def _html(row: dict[str, Any], folder: Path) -> dict[str, Any]:
    page = (folder / row["html_path"]).resolve()
    if not page.is_relative_to(folder.resolve()):
        raise ValueError(f"{row['html_path']} leads out of {folder}")
    kept = ("task_id", "website_id", "task_topic", "task_description", "tsv_header", "filtering_instruction")
    return {**{name: row[name] for name in kept}, "html_str": _text(page), "reference_output": row["gt"]}


def _code(row: dict[str, Any], folder: Path) -> dict[str, Any]:
    code = {"pseudocode": "\n".join(row["pseudocode_lines"]), "reference_output": "\n".join(row["code_lines"])}
    return {**code, "testcases": row["testcases"], "problem_id": row["problem_id"]}


def _path(row: dict[str, Any], folder: Path) -> dict[str, Any]:
    source, target = row["question_repr"]
    return {"city_context": row["context_nl"], "src_city": source, "dst_city": target, "reference_output": row["answer_nl"]}


def _tom(row: dict[str, Any], folder: Path) -> dict[str, Any]:
    kept = {name: row[name] for name in ("story_components", "story", "question")}
    return {**kept, "reference_output": row["solution"]}


def _countdown(row: dict[str, Any], folder: Path) -> dict[str, Any]:
    reference = countdown.trace(row["nums"], row["target"])
    lines = reference.partition("<Solution>\n")[2].splitlines()[:3]
    return {"nums": row["nums"], "target": row["target"], "solution": lines, "reference_output": reference}


def _travel(row: dict[str, Any], folder: Path) -> dict[str, Any]:
    kept = ("id", "ground_truth_plan", "ground_truth_cities", "ground_truth_durations")
    problem = {"problem": row["disambig_question_text"], "reference_output": travel_planning.trace(row)}
    return {**{name: row[name] for name in kept}, **problem}


_READERS: dict[str, Callable[[dict[str, Any], Path], dict[str, Any]]] = {
    "html_to_tsv": _html, "pseudo_to_code": _code, "path_traversal": _path,
    "tom_tracking": _tom, "countdown": _countdown, "travel_planning": _travel,
}  # fmt: skip
