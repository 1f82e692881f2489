"""Sources: every format gives the same records, splits are stable, and every defect is named by file and line."""

import json

import pytest

from lora_jax import data
from lora_jax.data import records
from lora_jax.errors import UserError

ROWS = [{"text": f"text {i}", "label": "ab"[i % 2]} for i in range(40)]


def jsonl(path, rows):
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")
    return path


def texts(records):
    return [r.values["text"] for r in records]


@pytest.fixture
def folder(tmp_path):
    for name, rows in (("train", ROWS[:20]), ("dev", ROWS[20:30]), ("test", ROWS[30:])):
        jsonl(tmp_path / f"{name}.jsonl", rows)
    return tmp_path


def test_folder(folder):
    splits = data.load(folder)
    assert {k: len(v) for k, v in splits.items()} == {"train": 20, "dev": 10, "test": 10}
    assert splits["dev"][2].values == ROWS[22]
    assert splits["dev"][2].where == f"{folder / 'dev.jsonl'} line 3"
    assert splits.notices == ()


def write(path, rows):
    if path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix in (".csv", ".tsv"):
        mark = "," if path.suffix == ".csv" else "\t"
        path.write_text(
            "".join(mark.join(f'"{x}"' for x in r) + "\n" for r in [rows[0].keys(), *[r.values() for r in rows]])
        )
    else:
        jsonl(path, rows)


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".tsv", ".parquet"])
@pytest.mark.parametrize("dev", ["dev", "validation", "valid", "val"])
def test_every_format_and_alias_gives_the_same_records(tmp_path, suffix, dev):
    rows = [{"text": f'a, "quoted" \u2028 line{i}'.replace('"', "'"), "label": str(i)} for i in range(3)]
    write(tmp_path / f"train{suffix}", rows)
    write(tmp_path / f"{dev}{suffix}", rows[1:])
    splits = data.load(tmp_path)
    assert [r.values for r in splits["train"]] == rows
    assert [r.values for r in splits["dev"]] == rows[1:]
    assert splits["test"] == []


def test_parts_of_one_split_are_joined(tmp_path):
    for i in range(2):
        write(tmp_path / f"train-0000{i}-of-00002.parquet", ROWS[i * 5 : i * 5 + 5])
    jsonl(tmp_path / "dev.jsonl", ROWS[10:12])
    assert texts(data.load(tmp_path)["train"]) == texts([data.Record(r) for r in ROWS[:10]])


def test_one_file_is_split_by_content(tmp_path):
    splits = data.load(jsonl(tmp_path / "all.jsonl", ROWS + ROWS[:7]))
    assert {k: len({*texts(v)}) for k, v in splits.items()} == {"train": 32, "dev": 4, "test": 4}
    sets = {k: {*texts(v)} for k, v in splits.items()}
    # Repeated records never lie on both sides of a split.
    assert not sets["train"] & sets["dev"] and not sets["train"] & sets["test"] and not sets["dev"] & sets["test"]
    assert sum(map(len, splits.values())) == 47
    turned = data.load(jsonl(tmp_path / "turned.jsonl", ROWS[::-1]))
    assert {*texts(turned["dev"])} == sets["dev"]
    assert {*texts(data.load(tmp_path / "all.jsonl", seed=1)["dev"])} != sets["dev"]
    assert "split by a hash" in splits.notices[0]


def test_missing_dev_is_held_out_with_a_notice(tmp_path):
    jsonl(tmp_path / "train.jsonl", ROWS)
    splits = data.load(tmp_path)
    assert (len(splits["train"]), len(splits["dev"]), splits["test"]) == (36, 4, [])
    assert "held out 4 of its train records, 36 remain" in splits.notices[0]
    with pytest.raises(UserError, match="has no test split; it has: train"):
        data.load(tmp_path, need=("test",))
    jsonl(tmp_path / "train.jsonl", ROWS[:1])
    with pytest.raises(UserError, match="holds 1 distinct records, too few"):
        data.load(tmp_path)


def test_limit_keeps_a_subset_of_a_larger_limit(folder):
    small, large, whole = (texts(data.load(folder, limit=n)["train"]) for n in (5, 9, None))
    assert len(small) == 5 and len(large) == 9 and set(small) < set(large) < set(whole)
    assert large == [t for t in whole if t in large]  # the order of the file
    assert small != whole[:5]  # a sorted file would lose its classes
    for wrong in (0, -1, 2.5, True, "3"):
        with pytest.raises(UserError, match="data.limit must be a whole number"):
            data.load(folder, limit=wrong)


def test_fields_are_renamed(folder):
    record = data.load(folder, {"text": "label", "other": None})["train"][1]
    assert record.values == {"label": "b", "text": "b"}  # their own `text` gives way to what the user chose
    jsonl(folder / "train.jsonl", [{"mr": "a", "ref": "b"}])
    jsonl(folder / "dev.jsonl", [{"mr": "a", "refs": ["b"]}])
    splits = data.load(folder, {"completion": "ref", "references": "refs"})
    assert "completion" not in splits["dev"][0].values
    with pytest.raises(
        UserError, match=r"line 1 has no field 'ref', which stands for 'completion'; did you mean 'refs'"
    ):
        splits["dev"][0].require("completion")
    with pytest.raises(
        UserError, match=r"data.fields.text='sentense', but .*train.jsonl line 1 has no such field; did"
    ):
        data.load(folder, {"text": "sentense"})


def test_a_field_that_is_mapped_to_an_absent_one_is_absent(folder):
    jsonl(folder / "dev.jsonl", [{"text": "the wrong one"}])
    splits = data.load(folder, {"text": "label"})
    assert splits["train"][0].values["text"] == "a" and "text" not in splits["dev"][0].values


def test_a_byte_order_mark_is_no_part_of_the_data(tmp_path):
    (tmp_path / "train.csv").write_bytes(b"\xef\xbb\xbftext,label\na,b\n")
    assert data.load(tmp_path, need=("train",))["train"][0].values == {"text": "a", "label": "b"}


def test_order_of_fields_is_no_part_of_a_record():
    assert records.digest({"a": 1, "b": 2}) == records.digest({"b": 2, "a": 1}) != records.digest({"a": 2, "b": 1})


def test_fingerprint_is_of_the_content(folder):
    first = data.load(folder).fingerprint
    assert first == data.load(folder, seed=3).fingerprint
    jsonl(folder / "dev.jsonl", ROWS[21:31])
    assert data.load(folder).fingerprint != first


BAD = [
    ("train.jsonl", b'{"text": "a"}\n\n{"text": "b\n', r"train.jsonl line 3 is not valid JSON: .* at column"),
    ("train.jsonl", b'{"text": "a"}\n["b"]\n', r"train.jsonl line 2 is not an object but list"),
    ("train.jsonl", b"", r"train.jsonl holds no record: the split is empty"),
    ("train.jsonl", b"\n \n", r"train.jsonl holds no record"),
    ("train.jsonl", b'{"text": "a"}\n{"text": "caf\xe9"}\n', r"train.jsonl line 2 is not UTF-8 \(byte 0xe9\)"),
    ("train.json", b'[{"text": "a"},\n {"text": }]', r"train.json line 2 is not valid JSON"),
    ("train.json", b'[{"text": "a"}, 3]', r"train.json record 2 is not an object but int"),
    ("train.jsonl", b"[" * 100000, r"line 1 is nested too deeply"),
    ("train.csv", b"text,label\na,b\nc\n", r"train.csv line 3 has 1 columns, but the header has 2: text, label"),
    ("train.csv", b'text,label\n"a"x,b\n', r"train.csv line 2 is not valid CSV"),
    ("train.csv", b"text,text\na,b\n", r"train.csv line 1: the column 'text' stands twice"),
    ("train.csv", b"text,label\n", r"train.csv holds no record"),
    ("train.parquet", b"PAR1 no", r"train.parquet is not a valid parquet file"),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD)
def test_a_broken_file_is_named_with_its_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        data.load(tmp_path)


def test_a_csv_cell_may_be_long(tmp_path):
    write(tmp_path / "train.csv", [{"text": "x" * 200_000}])
    assert len(data.load(tmp_path, need=("train",))["train"][0].values["text"]) == 200_000


def test_missing_paths_name_the_nearest(folder):
    with pytest.raises(UserError, match=r"there is no 'tran.jsonl' in the folder .*did you mean 'train.jsonl'"):
        data.load(folder / "tran.jsonl")
    with pytest.raises(UserError, match=rf"there is no 'nowhere' in the folder {folder}"):
        data.load(folder / "nowhere" / "deep" / "sst2")
    with pytest.raises(UserError, match="train.jsonl is a file, so there is no"):
        data.load(folder / "train.jsonl" / "x")
    with pytest.raises(UserError, match="data.path is empty"):
        data.load("")
    (folder / "notes.txt").write_text("x")
    with pytest.raises(UserError, match="suffix '.txt' is none of .jsonl, .json"):
        data.load(folder / "notes.txt")


def test_a_folder_without_splits_lists_what_it_holds(tmp_path):
    jsonl(tmp_path / "reviews.jsonl", ROWS)
    with pytest.raises(UserError, match=r"has no train, dev or test file .*it holds: reviews.jsonl"):
        data.load(tmp_path)
    jsonl(tmp_path / "val.jsonl", ROWS)
    jsonl(tmp_path / "dev.jsonl", ROWS)
    with pytest.raises(UserError, match="several dev files: dev.jsonl, val.jsonl"):
        data.load(tmp_path)


def test_relative_path_is_no_hub_id(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    for path in (f"./{folder.name}x", f"{folder.name}/sst2", "./x", "trian.jsonl"):
        with pytest.raises(UserError, match="^there is no"):
            data.load(path)


def test_hub_offline(monkeypatch, tmp_path):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    with pytest.raises(UserError, match=r"'nobody/nothing' is no path, and could not be loaded from the hub"):
        data.load("nobody/nothing")


def test_hub_names_classes_and_splits(monkeypatch):
    datasets = pytest.importorskip("datasets")
    kinds = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    table = datasets.Dataset.from_dict({"text": ["a", "b", "c"], "label": [1, 0, -1]}, features=kinds)
    asked = []

    def load_dataset(*args):
        asked.append(args)
        return datasets.DatasetDict({"train": table, "validation": table, "extra": table})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    splits = data.load("owner/name:config")
    assert asked == [("owner/name", "config")]
    assert [r.values["label"] for r in splits["dev"]] == ["yes", "no", None]
    assert splits["dev"][0].where == "owner/name:config validation row 1"
    with pytest.raises(UserError, match="row 3: the field 'label' is null"):
        splits["train"][2].require("label")


def test_text_must_be_text():
    with pytest.raises(UserError, match="line 9: the field 'q' must be text, got int 3"):
        data.Record({"text": 3, "q": 3}, "line 9", {"text": "q"}).text("text")
    with pytest.raises(UserError, match="half a surrogate pair"):
        data.Record(json.loads('{"text": "\\ud800"}'), "line 9").text("text")
    with pytest.raises(UserError, match="a record has no field 'text'; there are none"):
        data.Record({}).text("text")


@pytest.mark.parametrize(("name", "train", "dev"), [("sst2", 6920, 872), ("e2e", 23737, 547), ("oasst_chat", 75, 10)])
def test_real_data(shared_data, name, train, dev):
    splits = data.load(shared_data / name)
    assert (len(splits["train"]), len(splits["dev"])) == (train, dev)
    assert splits["train"][-1].where.endswith(f"train.jsonl line {train}")
