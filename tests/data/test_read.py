import functools
import gzip
import http.server
import json
import threading

import datasets
import pytest

from lit_rlhf.data.read import read_file
from lit_rlhf.data.sources import open_source, pick, pick_val

ROWS = [{"prompt": "a", "label": "b"}, {"prompt": "c\nd", "label": "é"}]


def write(path, data):
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def jsonl(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def test_jsonl_with_blank_lines_and_a_byte_order_mark(tmp_path):
    path = write(tmp_path / "x.jsonl", "\ufeff" + jsonl(ROWS[:1]) + "\n" + jsonl(ROWS[1:]))
    assert list(read_file(path)) == [(f"{path}:1", ROWS[0]), (f"{path}:3", ROWS[1])]


def test_gzip(tmp_path):
    path = write(tmp_path / "x.jsonl.gz", gzip.compress(jsonl(ROWS).encode()))
    assert [row for _, row in read_file(path)] == ROWS
    cut = write(tmp_path / "cut.jsonl.gz", gzip.compress(jsonl(ROWS * 1000).encode())[:-20])
    with pytest.raises(ValueError, match=r"cut.jsonl.gz: cannot be unpacked after line \d+ .*: the file is damaged or cut off"):
        list(read_file(cut))


def test_json_array_says_lines(tmp_path):
    path = write(tmp_path / "x.json", "[\n" + json.dumps(ROWS[0], indent=1) + ",\n\n" + json.dumps(ROWS[1]) + "]\n")
    assert list(read_file(path)) == [(f"{path}:2", ROWS[0]), (f"{path}:7", ROWS[1])]
    path = write(tmp_path / "lines.json", jsonl(ROWS))
    assert [row for _, row in read_file(path)] == ROWS


def test_csv(tmp_path):
    path = write(tmp_path / "x.csv", 'prompt,label\na,b\n"c\nd",é\n')
    assert list(read_file(path)) == [(f"{path}:2", ROWS[0]), (f"{path}:3", ROWS[1])]
    path = write(tmp_path / "x.csv.gz", gzip.compress('prompt,label\na,b\n"c\nd",é\n'.encode()))
    assert [row for _, row in read_file(path)] == ROWS
    path = write(tmp_path / "x.tsv", "prompt\tlabel\na\tb\n")
    assert [row for _, row in read_file(path)] == ROWS[:1]


def test_parquet_and_arrow(tmp_path):
    data = datasets.Dataset.from_list(ROWS)
    data.to_parquet(tmp_path / "x.parquet")
    assert list(read_file(tmp_path / "x.parquet")) == [(f"{tmp_path}/x.parquet[0]", ROWS[0]), (f"{tmp_path}/x.parquet[1]", ROWS[1])]
    data.save_to_disk(tmp_path / "saved")
    arrow = next((tmp_path / "saved").glob("*.arrow"))
    assert [row for _, row in read_file(arrow)] == ROWS


def rows(part):
    return [row for _, row in part.rows()]


def test_sources_without_splits(tmp_path):
    data = datasets.Dataset.from_list(ROWS)
    data.save_to_disk(tmp_path / "saved")
    for source in (ROWS, data, str(write(tmp_path / "x.jsonl", jsonl(ROWS))), tmp_path / "saved"):
        parts = open_source(source)
        assert list(parts) == [""]
        assert rows(parts[""]) == ROWS
        assert parts[""].content() == open_source(source)[""].content() != open_source(ROWS[:1])[""].content()
    assert rows(open_source(["a", "b"])[""]) == [{"prompt": "a"}, {"prompt": "b"}]


def test_splits(tmp_path):
    both = datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS), "valid": datasets.Dataset.from_list(ROWS[:1])})
    both.save_to_disk(tmp_path / "saved")
    for source in (both, str(tmp_path / "saved")):
        parts = open_source(source)
        assert rows(pick(parts, "train", "x", "train_split")) == ROWS
        assert rows(pick_val(parts, None, "x", "val_split")) == ROWS[:1]
    with pytest.raises(ValueError, match=r"x has no split 'trian' \(has: train, valid\): set train_split"):
        pick(parts, "trian", "x", "train_split")
    with pytest.raises(ValueError, match=r"x has no split 'dev' \(has: train, valid\): set val_split"):
        pick_val(parts, "dev", "x", "val_split")
    assert pick_val(parts, None, "x", "val_split", taken="valid") is None


@pytest.mark.parametrize(
    "names",
    [
        ("train.jsonl", "valid.jsonl"),
        ("data/train-00000-of-00001.jsonl", "data/validation-00000-of-00001.jsonl"),
        ("my_train.jsonl", "my_val.jsonl"),
    ],
)
def test_folder_of_files(tmp_path, names):
    for name, data in zip(names, (ROWS, ROWS[:1]), strict=True):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write(tmp_path / name, jsonl(data))
    parts = open_source(str(tmp_path))
    assert rows(pick(parts, "train", "x", "train_split")) == ROWS
    assert rows(pick_val(parts, None, "x", "val_split")) == ROWS[:1]


def test_folder_without_split_names_is_one_split(tmp_path):
    write(tmp_path / "part1.jsonl", jsonl(ROWS))
    write(tmp_path / "part2.csv", "prompt,label\na,b\n")
    assert rows(open_source(str(tmp_path))[""]) == [*ROWS, ROWS[0]]
    assert rows(open_source(str(tmp_path))["part1"]) == ROWS  # any file can be named as a split


def test_hub_goes_through_load_dataset(tmp_path, monkeypatch):
    # datasets.load_dataset itself, on a local folder in the hub's layout; open_source only sees the name of a repository.
    folder = tmp_path / "hub" / "data"
    folder.mkdir(parents=True)
    datasets.Dataset.from_list(ROWS).to_parquet(folder / "train-00000-of-00001.parquet")
    datasets.Dataset.from_list(ROWS[:1]).to_parquet(folder / "validation-00000-of-00001.parquet")
    real, asked = datasets.load_dataset, []

    def load_dataset(path, name, revision):
        asked.append((path, name, revision))
        return real(str(tmp_path / "hub"))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    parts = open_source("CarperAI/openai_summarize_tldr", name="config", revision="abc")
    assert asked == [("CarperAI/openai_summarize_tldr", "config", "abc")]
    assert rows(parts["train"]) == ROWS
    assert rows(pick_val(parts, None, "x", "val_split")) == ROWS[:1]


@pytest.fixture
def server(tmp_path):
    folder = tmp_path / "www"
    folder.mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=folder)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield folder, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_url(server, tmp_path, monkeypatch):
    folder, address = server
    monkeypatch.setattr(datasets.config, "DOWNLOADED_DATASETS_PATH", str(tmp_path / "downloads"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)  # make test sets it; this server is on the same machine
    write(folder / "x.jsonl.gz", gzip.compress(jsonl(ROWS).encode()))
    url = f"{address}/x.jsonl.gz?download=true"
    assert list(open_source(url)[""].rows()) == [(f"{address}/x.jsonl.gz:1", ROWS[0]), (f"{address}/x.jsonl.gz:2", ROWS[1])]
    with pytest.raises(ValueError, match=r"missing.jsonl: cannot be fetched"):
        open_source(f"{address}/missing.jsonl")
    with pytest.raises(ValueError, match=r"the address must end in the name of a file, one of \.json"):
        open_source(f"{address}/page.html")


def test_what_is_no_source(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"data/x.jsonl: no such file or folder \(looked from /"):
        open_source("data/x.jsonl")
    with pytest.raises(ValueError, match="holds no data file"):
        open_source(str(tmp_path))
    with pytest.raises(ValueError, match="a streaming data set has no length: take the rows that you want"):
        open_source(datasets.Dataset.from_list(ROWS).to_iterable_dataset())
    with pytest.raises(ValueError, match="not int"):
        open_source(3)
