import copy
import json
import pickle
import warnings

import pytest
import torch
import torch.multiprocessing as mp

from lit_rlhf.metrics import PairAccuracy, Rouge

CAT, DOG = ("the cat sat", "the cat ran fast"), ("a dog", "a dog")


def value(result):
    return {name: float(x) for name, x in result.items()}


def test_rouge_by_hand():
    rouge = Rouge()
    # unigrams: 2 in common of 3 and 4, F = 2 * 2 / 7 ; bigrams: 1 of 2 and 3, F = 2 / 5 ; longest common subsequence "the cat": 4 / 7
    rouge.update([CAT[0]], [CAT[1]])
    expected = {"rouge1": 4 / 7, "rouge2": 0.4, "rougeL": 4 / 7, "rouge_mean": (8 / 7 + 0.4) / 3}
    assert value(rouge.compute()) == pytest.approx(expected)
    rouge.update([DOG[0]], [DOG[1]])  # the mean over texts, not over updates or words
    assert float(rouge.compute()["rouge1"]) == pytest.approx((4 / 7 + 1) / 2)
    rouge.update([DOG[0], "x"], [DOG[1], "y"])
    assert float(rouge.compute()["rouge1"]) == pytest.approx((4 / 7 + 1 + 1 + 0) / 4)


def test_rouge_keys_and_stemmer():
    rouge = Rouge(keys=("rouge1",), use_stemmer=False)
    rouge.update(["running"], ["run"])
    assert value(rouge.compute()) == {"rouge1": 0.0, "rouge_mean": 0.0}
    rouge = Rouge(keys=("rouge1",))  # Porter: running -> run
    rouge.update(["running"], ["run"])
    assert value(rouge.compute()) == {"rouge1": 1.0, "rouge_mean": 1.0}


def test_rouge_of_chinese():
    text = "我家的猫坐在垫子上。"
    plain = Rouge()
    with pytest.warns(UserWarning, match="tokenizer='characters'"):
        plain.update([text], [text])
    assert float(plain.compute()["rouge1"]) == 0.0
    rouge = Rouge(tokenizer="characters")
    rouge.update([text], [text])
    assert value(rouge.compute()) == {"rouge1": 1.0, "rouge2": 1.0, "rougeL": 1.0, "rouge_mean": 1.0}
    rouge.reset()
    rouge.update(["猫 坐!"], ["猫在坐"])  # punctuation and spaces are no tokens: 2 of 2 and 3, F = 4/5; no bigram; subsequence of 2
    assert value(rouge.compute()) == pytest.approx({"rouge1": 0.8, "rouge2": 0.0, "rougeL": 0.8, "rouge_mean": 1.6 / 3})


def test_rouge_takes_a_function_or_an_object():
    class Words:
        def tokenize(self, text):
            return text.split("-")

    for tokenizer in (Words(), lambda text: text.split("-")):
        rouge = Rouge(keys=("rouge1",), tokenizer=tokenizer)
        rouge.update(["猫-狗"], ["猫-鸟"])
        assert float(rouge.compute()["rouge1"]) == 0.5
    with pytest.raises(ValueError, match="'character'"):
        Rouge(tokenizer="character")


def test_rouge_refuses_what_cannot_be_paired():
    with pytest.raises(ValueError, match="2 predictions but 1 references"):
        Rouge().update(["a", "b"], ["a"])
    with pytest.raises(TypeError, match="lists"):
        Rouge().update("abc", "abc")


def test_pair_accuracy_by_hand():
    metric = PairAccuracy()
    metric.update(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.0, 2.0, 4.0]), {"confidence": [9, 9, 1]})  # right, tie = wrong, wrong
    metric.update(torch.tensor([5.0, 5.0]), torch.tensor([0.0, 0.0]), {"confidence": [1, None], "split": ["valid\n1", "é"]})
    assert value(metric.compute()) == {
        "accuracy": pytest.approx(3 / 5),
        "pairs": 5,
        "accuracy/confidence/1": 0.5,
        "pairs/confidence/1": 2,
        "accuracy/confidence/9": 0.5,
        "pairs/confidence/9": 2,
        "accuracy/split/valid\n1": 1.0,
        "pairs/split/valid\n1": 1,
        "accuracy/split/é": 1.0,
        "pairs/split/é": 1,
    }
    metric.reset()
    metric.update(torch.tensor([1.0]), torch.tensor([0.0]))
    assert value(metric.compute()) == {"accuracy": 1.0, "pairs": 1}


def test_pair_accuracy_refuses_what_cannot_be_paired():
    with pytest.raises(ValueError, match="shapes"):
        PairAccuracy().update(torch.zeros(2), torch.zeros(3))
    with pytest.raises(ValueError, match="column 'split' has 1 values for 2 pairs"):
        PairAccuracy().update(torch.zeros(2), torch.zeros(2), {"split": ["a"]})


def test_nothing_to_report():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchmetrics says that compute came before update
        assert Rouge().compute() == {} and PairAccuracy().compute() == {}


def fill(metric, rank):
    if isinstance(metric, Rouge):
        for pair in ([CAT], [DOG, DOG])[rank]:
            metric.update([pair[0]], [pair[1]])
    elif rank == 0:
        metric.update(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]), {"batch": ["b3", "b4"]})
        metric.update(torch.tensor([1.0]), torch.tensor([0.0]), {"batch": ["b3"], "only": ["here"]})
    else:
        metric.update(torch.tensor([1.0]), torch.tensor([0.0]), {"batch": ["b4"]})


EXPECTED = {
    "rouge1": pytest.approx((4 / 7 + 2) / 3),
    "accuracy": 0.75,
    "pairs": 4.0,
    "accuracy/batch/b3": 1.0,
    "pairs/batch/b3": 2.0,
    "accuracy/batch/b4": 0.5,
    "pairs/batch/b4": 2.0,
    "accuracy/only/here": 1.0,
    "pairs/only/here": 1.0,
}


def test_metrics_copy_pickle_and_call():
    for metric in (Rouge(keys=("rouge1",)), Rouge(keys=("rouge1",), tokenizer="characters"), PairAccuracy()):
        fill(metric, 0)
        expected = value(metric.compute())
        assert value(copy.deepcopy(metric).compute()) == expected
        assert value(pickle.loads(pickle.dumps(metric)).compute()) == expected
        assert not metric.state_dict()  # nothing of an evaluation goes into a checkpoint
    metric = PairAccuracy()
    step = metric(torch.tensor([1.0]), torch.tensor([0.0]), {"a": ["x"]})  # forward: this batch's value, and added to the state
    metric(torch.tensor([0.0]), torch.tensor([0.0]), {"a": ["x"]})
    assert value(step)["accuracy/a/x"] == 1.0 and value(metric.compute())["accuracy/a/x"] == 0.5


def worker(rank, path):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{path}/store", rank=rank, world_size=2)
    rouge, pairs, one_sided, grouped = Rouge(keys=("rouge1",)), PairAccuracy(), PairAccuracy(), PairAccuracy()
    fill(rouge, rank)
    fill(pairs, rank)
    if rank == 0:  # the other rank has no pair at all
        fill(one_sided, 0)
    grouped.update(torch.tensor([1.0]), torch.tensor([0.0]), {"a": ["x"]} if rank else None)  # the first rank knows no groups
    result = (
        value(rouge.compute()) | value(pairs.compute()) | {"one_sided": value(one_sided.compute()), "grouped": value(grouped.compute())}
    )
    fill(pairs, rank)  # after compute each rank has its own state again
    result["again"] = value(pairs.compute())["pairs"]
    with open(f"{path}/{rank}.json", "w") as file:
        json.dump(result, file)
    torch.distributed.destroy_process_group()


def test_two_ranks_report_the_same_numbers(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mp.spawn(worker, args=(str(tmp_path),), nprocs=2)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    assert {name: first[name] for name in EXPECTED} == EXPECTED
    assert first["one_sided"]["accuracy"] == pytest.approx(2 / 3) and first["one_sided"]["pairs/only/here"] == 1.0
    assert first["grouped"] == {"accuracy": 1.0, "pairs": 2.0, "accuracy/a/x": 1.0, "pairs/a/x": 1.0}
    assert first["again"] == 8.0
