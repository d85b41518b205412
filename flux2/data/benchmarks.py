"""Published benchmarks' prompt files, read as they are published; none is shipped or fetched.

Each function gives a `Listed` dataset of prompts (and reference images), with black targets that
say the size, as `readers.Prompts` has them. Ground truth goes into meta under the names that
rewards read: `text` (OCR), `include` and `exclude` (objects), `questions` (a judge); `benchmark`
and `category` are in all. A line that does not fit its format is refused by file and line.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flux2.data.lines import FORMATS, read_lines, read_objects, read_text
from flux2.data.readers import Row, RowDataset, Rows, Size, checked_sizes
from flux2.errors import InputError

RELATIONS = ("left of", "right of", "above", "below")
"""GenEval's."""
LIVE = ("cat", "dog")
"""DreamBench's classes that have prompts of their own."""


@dataclass(frozen=True, eq=False)
class Listed(RowDataset[Row]):
    """Rows as a dataset (`flux2.data.record.Dataset`).

    Attributes:
        rows: in the order of the files.
        size: (h, w) of the images to make, and of references, which are resized to cover it.
        stamp: changes with any row, and any reference's size or time; it keeps caches honest.
    """

    rows: Sequence[Row] = field(repr=False)
    size: Size
    stamp: str = field(init=False)
    _rows: Rows[Row] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        digest = hashlib.sha256(repr(self.size).encode())
        for row in self.rows:
            files = [(str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in row.references]
            digest.update(repr((row.prompt, files, row.meta)).encode())
        object.__setattr__(self, "_rows", Rows(self.rows, (self.size,)))
        object.__setattr__(self, "stamp", digest.hexdigest()[:16])


# -- GenEval -------------------------------------------------------------------------------------


def geneval(path: str, height: int = 1024, width: int = 1024) -> Listed:
    """GenEval (arXiv 2310.11513): objects, counts, colours, positions.

    Args:
        path: evaluation_metadata.jsonl, or a folder that holds it (or prompts/ with it). A line has
            `prompt`, `tag` and `include`, a list of {class, count, color?, position?: [relation,
            index of an earlier one]}, and perhaps `exclude`, of {class, count}.
        height, width: of the images to make, in multiples of 16.

    Raises:
        InputError: no such file, or a line that is no such object.
    """
    name = "evaluation_metadata.jsonl"
    file = _file(path, name, f"prompts/{name}")
    rows = []
    for where, obj in read_objects(file):
        include = [_clause(c, k, where) for k, c in enumerate(_list(obj, "include", where))]
        if not include:
            raise InputError(f'{where}: "include" is empty: give at least one thing')
        exclude = [_clause(c, 0, where) for c in _list(obj, "exclude", where, optional=True)]
        tag = _string(obj, "tag", where)
        meta = {"benchmark": "geneval", "category": tag, "include": include, "exclude": exclude}
        rows.append(Row(_string(obj, "prompt", where), meta=meta))
    return Listed(rows, _size(height, width))


def _clause(clause: Any, index: int, where: str) -> dict[str, Any]:
    good = isinstance(clause, dict) and isinstance(clause.get("class"), str)
    if not good or type(clause.get("count")) is not int or clause["count"] < 1:
        raise InputError(f'{where}: {clause!r} is no {{"class": …, "count": a number from 1}}')
    if not isinstance(clause.get("color", ""), str):
        raise InputError(f'{where}: the "color" of {clause["class"]!r} is no string')
    place = clause.get("position")
    if place is not None:
        fits = isinstance(place, list) and len(place) == 2 and place[0] in RELATIONS
        if not fits or type(place[1]) is not int or not 0 <= place[1] < index:
            raise InputError(
                f"{where}: position {place!r} is not [{', '.join(RELATIONS)}; the number of an "
                "earlier thing]"
            )
    return dict(clause)


# -- DPG-Bench -----------------------------------------------------------------------------------


def dpg(path: str, height: int = 1024, width: int = 1024) -> Listed:
    """DPG-Bench (ELLA, arXiv 2403.05135): long prompts with questions that depend on each other.

    `meta["questions"]` are {id, question, tuple, parents (ids; a question counts only if those are
    answered yes), category}.

    Args:
        path: dpg_bench.csv (item_id, text, proposition_id, dependency, category_broad, tuple,
            question_natural_language, a row a question), or a folder with it and perhaps with
            prompts/<item_id>.txt, which is then the prompt; or a folder of .txt alone, without
            questions.
        height, width: of the images to make, in multiples of 16.

    Raises:
        InputError: no such file, a row that does not fit, a prompt that is missing.
    """
    root = Path(path).expanduser()
    table = root if root.is_file() else root / "dpg_bench.csv"
    if not table.is_file():
        return Listed(_prompt_files(root), _size(height, width))
    texts = table.parent / "prompts"
    prompts: dict[str, str] = {}
    questions: dict[str, list[dict[str, Any]]] = {}
    needs = ("item_id", "text", "proposition_id", "dependency", "tuple",
             "question_natural_language")  # fmt: skip
    for where, row in _table(table, needs):
        item, text = row["item_id"].strip(), row["text"].strip()
        if not item or not text:
            raise InputError(f"{where} has no item_id or no text: correct the row")
        if prompts.setdefault(item, text) != text:
            raise InputError(f"{where}: {item} has two texts: give each item one")
        questions.setdefault(item, []).append(_question(row, where))
    if texts.is_dir():
        prompts = {item: _prompt_file(texts / f"{item}.txt") for item in prompts}
    rows = [
        Row(prompts[item], meta={"benchmark": "dpg", "category": "dense", "item": item,
                                 "questions": tuple(asked)})
        for item, asked in questions.items()
    ]  # fmt: skip
    return Listed(rows, _size(height, width))


def _question(row: Mapping[str, str], where: str) -> dict[str, Any]:
    try:
        number = int(row["proposition_id"])
        parents = [int(d) for d in row["dependency"].split(",")]
    except ValueError as error:
        raise InputError(f"{where}: proposition_id and dependency are numbers: {error}") from None
    return {
        "id": number,
        "question": row["question_natural_language"].strip(),
        "tuple": row["tuple"].strip(),
        "parents": tuple(p for p in parents if p),  # 0: none
        "category": row.get("category_broad", "").strip(),
    }


def _prompt_files(root: Path) -> list[Row]:
    folder = root / "prompts" if (root / "prompts").is_dir() else root
    files = sorted(folder.glob("*.txt"))
    if not files:
        raise InputError(f"{root} has neither dpg_bench.csv nor .txt prompts: correct the path")
    meta = {"benchmark": "dpg", "category": "dense"}
    return [Row(_prompt_file(f), meta={**meta, "item": f.stem}) for f in files]


def _prompt_file(file: Path) -> str:
    text = " ".join(read_text(file).split())
    if not text:
        raise InputError(f"{file} is empty: restore the prompt")
    return text


# -- text in images ------------------------------------------------------------------------------


def longtext(path: str, height: int = 1024, width: int = 1024) -> Listed:
    """LongText-Bench (X-Omni, arXiv 2507.22058): long texts to be written, English or Chinese.

    Args:
        path: text_prompts.jsonl or text_prompts_zh.jsonl, or a folder with the first. A line has
            `prompt`, `text` (a list of what should be written, or a string), and perhaps
            `category`, `prompt_id`, `length`.
        height, width: of the images to make, in multiples of 16.

    Raises:
        InputError: no such file, or a line that is no such object.
    """
    rows = []
    for where, obj in read_objects(_file(path, "text_prompts.jsonl")):
        text = [obj["text"]] if isinstance(obj.get("text"), str) else _list(obj, "text", where)
        if not all(isinstance(t, str) for t in text) or not "".join(text).strip():
            raise InputError(f'{where}: "text" is not a list of strings that say something')
        meta: dict[str, Any] = {"benchmark": "longtext", "category": obj.get("category", "text")}
        meta |= {k: obj[k] for k in ("prompt_id", "length") if k in obj}
        rows.append(Row(_string(obj, "prompt", where), meta={**meta, "text": tuple(text)}))
    return Listed(rows, _size(height, width))


def oneig(
    path: str,
    answers: str | None = None,
    category: str | None = "Text_Rendering",
    height: int = 1024,
    width: int = 1024,
) -> Listed:
    """OneIG-Bench (arXiv 2506.07977): the prompts of one category, by default text rendering.

    Args:
        path: OneIG-Bench.csv or OneIG-Bench-ZH.csv, or the same as JSON (a list of objects):
            `category`, `id`, and the prompt as `prompt_en`, `prompt_cn`, `prompt_zh` or `prompt`.
        answers: text_content.csv (`id`, `text_content`), the texts that should be read, for
            `meta["text"]`; None leaves them to what the prompts quote.
        category: which to keep; None keeps all.
        height, width: of the images to make, in multiples of 16.

    Raises:
        InputError: no such file, a row that does not fit, a category or answer that is missing.
    """
    file, told = Path(path).expanduser(), {}
    if answers is not None:
        pairs = _table(Path(answers).expanduser(), ("id", "text_content"))
        told = {row["id"].strip(): row["text_content"] for _, row in pairs}
    source = _array(file) if file.suffix == ".json" else _table(file, ("category", "id"))
    rows, known = [], set()
    for where, row in source:
        kind, number = (_string(row, key, where) for key in ("category", "id"))
        known.add(kind)
        if category is not None and kind != category:
            continue
        key = next((k for k in ("prompt_en", "prompt_cn", "prompt_zh") if k in row), "prompt")
        meta: dict[str, Any] = {"benchmark": "oneig", "category": kind, "item": number}
        if told:
            if number not in told:
                raise InputError(f"{where}: {answers} has no text for id {number}: complete it")
            meta["text"] = (told[number],)
        rows.append(Row(_string(row, key, where), meta=meta))
    if not rows:
        raise InputError(f"{file} has no {category}: choose from {', '.join(sorted(known))}")
    return Listed(rows, _size(height, width))


# -- references ----------------------------------------------------------------------------------


def dreambench(
    path: str, references: int = 1, token: str = "", height: int = 1024, width: int = 1024
) -> Listed:
    """Subjects by reference images, each in every scene: DreamBench and its like.

    Args:
        path: a folder in one of three layouts:
            DreamBench (arXiv 2208.12242): <subject>/<image> and prompts_and_classes.txt.
            DreamBench++ (arXiv 2406.16855): images/<category>/<n>.jpg and
            captions/<category>/<n>.txt, whose first line is the subject and each other a prompt.
            Your own: <subject>/<image> and prompts.txt, a prompt a line with {} for the subject
            ("my_cat2" is said as "my cat").
        references: images of a subject given with each prompt, the first by name.
        token: what stands before the class in DreamBench's prompts, if the model knows one.
        height, width: of the images to make, in multiples of 16.

    Raises:
        InputError: none of these layouts, a line that does not fit, too few images.
    """
    root = Path(path).expanduser()
    if references < 1:
        raise InputError(f"references is {references}: give at least 1")
    if (root / "captions").is_dir() and (root / "images").is_dir():
        found = _captioned(root)
    elif (root / "prompts_and_classes.txt").is_file():
        found = _dreambooth(root, token)
    elif (root / "prompts.txt").is_file():
        found = _own(root)
    else:
        raise InputError(
            f"{root} has neither prompts_and_classes.txt nor images/ and captions/ nor prompts.txt:"
            " correct the path"
        )
    rows = []
    for prompt, kind, subject, images in found:
        if len(images) < references:
            raise InputError(
                f"{root}: {subject} has {len(images)} images and references is {references}: give "
                "more images, or fewer references"
            )
        meta = {"benchmark": "dreambench", "category": kind, "subject": subject}
        rows.append(Row(prompt, references=tuple(images[:references]), meta=meta))
    if not rows:
        raise InputError(f"{root} has no subjects with images: correct the path")
    return Listed(rows, _size(height, width))


Scene = tuple[str, str, str, list[Path]]
"""(prompt, category, subject, its images)"""


def _images(folder: Path) -> list[Path]:
    found = folder.iterdir() if folder.is_dir() else ()
    return sorted(f for f in found if f.suffix.lower() in FORMATS and f.name[0] != ".")


def _captioned(root: Path) -> Iterator[Scene]:
    for file in sorted((root / "captions").rglob("*.txt")):
        lines = [line for _, line in read_lines(file)]
        if len(lines) < 2:
            raise InputError(f"{file} is no subject with prompts below: complete it")
        place = file.relative_to(root / "captions")
        images = [f for f in _images(root / "images" / place.parent) if f.stem == file.stem]
        for prompt in lines[1:]:
            yield prompt, place.parent.as_posix(), lines[0], images


def _dreambooth(root: Path, token: str) -> Iterator[Scene]:
    file = root / "prompts_and_classes.txt"
    classes: dict[str, str] = {}
    prompts: dict[str, list[str]] = {"object": [], "live": []}
    part = ""
    for number, line in read_lines(file):
        if line in ("Classes", "Prompts", "Object Prompts", "Live Subject Prompts"):
            part = line
        elif part == "Classes" and line != "subject_name,class":
            subject, _, name = line.partition(",")
            if not subject or not name:
                raise InputError(f"{file}, line {number} is no subject,class: correct it")
            classes[subject.strip()] = name.strip()
        elif part.endswith(" Prompts") and line[0] in "'\"":
            written = re.match(r"(['\"])(.*)\1\.format\(", line)
            if written is None or "{1}" not in written[2]:
                raise InputError(f"{file}, line {number} is no prompt with {{1}}: correct it")
            prompts["object" if part.startswith("Object") else "live"].append(written[2])
    if not classes or not all(prompts.values()):
        raise InputError(f"{file} lacks classes, object prompts or live subject prompts")
    for subject, name in classes.items():
        images = _images(root / subject)
        if not images:
            raise InputError(f"{file} names {subject}, and {root / subject} has no images")
        for prompt in prompts["live" if name in LIVE else "object"]:
            said = prompt.replace("{0}", token).replace("{1}", name)
            yield " ".join(said.split()), name, subject, images


def _own(root: Path) -> Iterator[Scene]:
    file = root / "prompts.txt"
    lines = read_lines(file)
    for number, line in lines:
        if line.count("{}") != 1:
            raise InputError(f"{file}, line {number} has not one {{}} for the subject: correct it")
    for folder in sorted(f for f in root.iterdir() if f.is_dir() and f.name[0] != "."):
        images = _images(folder)
        name = re.sub(r"\d+$", "", folder.name).replace("_", " ").strip()
        for _, line in lines if images else ():
            yield line.replace("{}", name), name, folder.name, images


# -- files ---------------------------------------------------------------------------------------


def _size(height: int, width: int) -> Size:
    [size] = checked_sizes([[height, width]])
    return size


def _file(path: str, *names: str) -> Path:
    """The file itself, or the first of `names` that a folder has."""
    root = Path(path).expanduser()
    if not root.is_dir():
        return root
    for name in names:
        if (root / name).is_file():
            return root / name
    raise InputError(f"{root} has no {names[0]}: give the file, or its folder")


def _string(obj: Mapping[str, Any], key: str, where: str) -> str:
    value = obj.get(key)
    if not isinstance(value, str) or not value.strip():
        raise InputError(f'{where} has no "{key}", a string: correct it')
    return value.strip()


def _list(obj: Mapping[str, Any], key: str, where: str, optional: bool = False) -> list[Any]:
    value = obj.get(key, [] if optional else None)
    if not isinstance(value, list):
        raise InputError(f'{where}: "{key}" is no list: correct it')
    return value


def _table(file: Path, needs: Sequence[str]) -> Iterator[tuple[str, dict[str, str]]]:
    """("file, line n", row) of a CSV with a header. Fields may hold line breaks."""
    reader = csv.reader(io.StringIO(read_text(file), newline=""), strict=True)
    try:
        header = next(reader, [])
        if missing := [name for name in needs if name not in header]:
            raise InputError(f"{file}, line 1 has no column {missing[0]}: is it the right file?")
        for cells in reader:
            where = f"{file}, line {reader.line_num}"
            if cells and len(cells) != len(header):
                raise InputError(f"{where} has {len(cells)} cells, not {len(header)}: correct it")
            if cells:
                yield where, dict(zip(header, cells, strict=True))
    except csv.Error as error:
        raise InputError(f"{file}, line {reader.line_num} is no CSV ({error})") from None


def _array(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """("file, entry n", object) of a JSON list of objects."""
    try:
        content = json.loads(read_text(file))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file} is not JSON ({error}): restore it") from None
    if not isinstance(content, list):
        raise InputError(f"{file} is no list of objects: is it the right file?")
    for number, entry in enumerate(content, 1):
        if not isinstance(entry, dict):
            raise InputError(f"{file}, entry {number} is no object: correct it")
        yield f"{file}, entry {number}", entry
