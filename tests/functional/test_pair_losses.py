"""Every expected number is worked by hand; softplus(-d) = -log sigmoid(d)."""

import math

import pytest
import torch

from lit_rlhf.functional import pairwise_loss, pairwise_token_loss, ranking_loss

T, F = True, False
LN2, LN3 = math.log(2), math.log(3)


def scores(*numbers):
    return torch.tensor(numbers, dtype=torch.float32, requires_grad=True)


def test_pairwise_loss_by_hand():
    # d = ln 3 -> sigmoid .75 ; d = 0 -> .5
    loss, stats = pairwise_loss(scores(LN3, 1.0), scores(0.0, 1.0))
    torch.testing.assert_close(loss, torch.tensor((-math.log(0.75) + LN2) / 2))
    assert stats["accuracy"].item() == 0.5  # the tie is wrong
    torch.testing.assert_close(stats["margin"], torch.tensor(LN3 / 2))
    torch.testing.assert_close(stats["chosen_score"], torch.tensor((LN3 + 1) / 2))
    torch.testing.assert_close(stats["rejected_score"], torch.tensor(0.5))


def test_a_mean_over_pairs_is_divided_once():
    # the trlX tutorial divides the running sum by bs inside its loop: two pairs of ln 2 give .75 ln 2 there
    loss, _ = pairwise_loss(scores(1.0, 2.0), scores(1.0, 2.0))
    torch.testing.assert_close(loss, torch.tensor(LN2))


def test_far_apart_scores_give_a_finite_loss_and_gradient():
    chosen, rejected = scores(-100.0), scores(0.0)  # log(sigmoid(-100)) is -inf in float32
    loss, _ = pairwise_loss(chosen, rejected)
    loss.backward()
    assert loss.item() == 100.0 and chosen.grad.item() == -1.0 and rejected.grad.item() == 1.0
    assert pairwise_loss(scores(100.0), scores(0.0))[0].item() == pytest.approx(0.0, abs=1e-30)


def test_margin_target_and_center():
    torch.testing.assert_close(pairwise_loss(scores(2.0), scores(0.0), margin=torch.tensor([2.0]))[0], torch.tensor(LN2))
    # t .75 at d = ln 3: -(.75 ln .75 + .25 ln .25) = .5623351, where the loss of that target is smallest
    chosen = scores(LN3)
    loss, _ = pairwise_loss(chosen, scores(0.0), target=torch.tensor([0.75]))
    torch.testing.assert_close(loss, torch.tensor(0.5623351))
    loss.backward()
    assert abs(chosen.grad.item()) < 1e-6
    # a tie pulls the scores together: gradient sigmoid(d) - t = .75 - .5
    chosen = scores(LN3)
    pairwise_loss(chosen, scores(0.0), target=torch.tensor([0.5]))[0].backward()
    assert chosen.grad.item() == pytest.approx(0.25)
    # center: .01 * (1 + 2)^2 = .09 more than softplus(1) = 1.3132617
    torch.testing.assert_close(pairwise_loss(scores(1.0), scores(2.0), center_coef=0.01)[0], torch.tensor(1.4032617))


def test_accuracy_follows_the_target():
    chosen, rejected = scores(1.0, 1.0, 0.0, 1.0), scores(0.0, 0.0, 1.0, 1.0)
    # preferred: first (right), second (wrong), second (right), second with equal scores (wrong)
    _, stats = pairwise_loss(chosen, rejected, target=torch.tensor([1.0, 0.0, 0.2, 0.2]))
    assert stats["accuracy"].item() == 0.5
    _, stats = pairwise_loss(chosen, rejected, target=torch.full((4,), 0.5))  # ties of people count, as if the first was preferred
    assert stats["accuracy"].item() == 0.5


def test_weights_weigh_loss_and_stats():
    loss, stats = pairwise_loss(scores(LN3, 0.0), scores(0.0, 1.0), weight=torch.tensor([2.0, 0.0]))
    torch.testing.assert_close(loss, torch.tensor(-math.log(0.75)))
    assert stats["accuracy"].item() == 1.0


def test_scores_of_bfloat16_and_no_pairs():
    assert pairwise_loss(scores(1.0).bfloat16(), scores(0.0).bfloat16())[0].dtype == torch.float32
    with pytest.raises(ValueError, match="empty"):
        pairwise_loss(scores(), scores())
    assert pairwise_loss(scores(), scores(), count=3)[0].item() == 0.0


def test_ranking_loss_averages_within_a_prompt_first():
    # prompt 5: scores ln 9, ln 3, 0: d = ln 3, ln 9, ln 3 -> -ln .75 = .2876821, -ln .9 = .1053605; mean (2 * .2876821 + .1053605) / 3
    # prompt 9: d = 0 -> .6931472. Loss (.2269082 + .6931472) / 2; the mean over pairs would be .3434679
    s = torch.tensor([math.log(9), LN3, 0.0, 4.0, 4.0])
    pairs, prompt_of = torch.tensor([[0, 1], [0, 2], [1, 2], [3, 4]]), torch.tensor([5, 5, 5, 9, 9])
    loss, stats = ranking_loss(s, pairs, prompt_of)
    torch.testing.assert_close(loss, torch.tensor(0.4600277))
    assert stats["accuracy"].item() == pytest.approx(0.5)  # all of prompt 5, none of prompt 9
    torch.testing.assert_close(ranking_loss(s, pairs, prompt_of, count=4)[0], torch.tensor(0.2300139))
    # a margin of ln 9 on the last pair alone: softplus(ln 9) = ln 10
    margin = torch.tensor([0.0, 0.0, 0.0, math.log(9)])
    torch.testing.assert_close(ranking_loss(s, pairs, prompt_of, margin=margin)[0], torch.tensor((0.2269082 + math.log(10)) / 2))


def test_ranking_loss_with_one_pair_each_is_the_pairwise_loss():
    loss, _ = ranking_loss(torch.tensor([LN3, 0.0, 1.0, 1.0]), torch.tensor([[0, 1], [2, 3]]), torch.tensor([0, 0, 1, 1]))
    torch.testing.assert_close(loss, torch.tensor((-math.log(0.75) + LN2) / 2))


def test_ranking_loss_refuses_a_pair_across_prompts():
    with pytest.raises(ValueError, match=r"pair 1 compares responses \[0, 2\] of two prompts, \[0, 1\]"):
        ranking_loss(torch.zeros(3), torch.tensor([[0, 1], [0, 2]]), torch.tensor([0, 0, 1]))


# The token loss. Rows: chosen 7 8 9, rejected 7 5; they part at t = 1, the longer one ends at t = 2.
CHOSEN, REJECTED = [0.0, 1.0, 2.0], [0.0, 0.0, 50.0]  # 50 stands in the padding
IDS, OTHER_IDS = [7, 8, 9], [7, 5, 0]
FULL, SHORT = [T, T, T], [T, T, F]


def token_loss(chosen=CHOSEN, rejected=REJECTED, ids=IDS, other_ids=OTHER_IDS, mask=FULL, other_mask=SHORT):
    rows = [torch.tensor([chosen], requires_grad=True), torch.tensor([rejected], requires_grad=True)]
    loss, stats = pairwise_token_loss(*rows, *(torch.tensor([x]) for x in (ids, other_ids, mask, other_mask)))
    return loss, stats, rows


def test_token_loss_by_hand():
    # t = 1: 1 - 0 -> softplus(-1) = .3132617 ; t = 2: 2 - (held) 0 -> softplus(-2) = .1269280
    loss, stats, rows = token_loss()
    torch.testing.assert_close(loss, torch.tensor((0.3132617 + 0.1269280) / 2))
    assert stats["accuracy"].item() == 1.0 and stats["margin"].item() == 2.0  # each row's own last score: 2 and 0
    assert stats["chosen_score"].item() == 2.0 and stats["rejected_score"].item() == 0.0
    loss.backward()
    # sigmoid(-1) = .2689414 and sigmoid(-2) = .1192029; the rejected row's last real token gets both, its padding nothing
    torch.testing.assert_close(rows[0].grad, torch.tensor([[0.0, -0.2689414, -0.1192029]]) / 2)
    torch.testing.assert_close(rows[1].grad, torch.tensor([[0.0, 0.2689414 + 0.1192029, 0.0]]) / 2)


@pytest.mark.parametrize("pad", [0, 5, 7, 9])  # also the ids of real tokens, as when pad = eos
@pytest.mark.parametrize("junk", [-50.0, math.nan, math.inf])
def test_token_loss_reads_nothing_of_the_padding(pad, junk):
    loss, stats, rows = token_loss(rejected=[0.0, 0.0, junk], other_ids=[7, 5, pad])
    torch.testing.assert_close(loss, torch.tensor((0.3132617 + 0.1269280) / 2))
    assert stats["accuracy"].item() == 1.0
    loss.backward()
    assert rows[1].grad[0, 2].item() == 0.0


def test_token_loss_of_the_shorter_one_preferred():
    # chosen 7 5, rejected 7 8 9: t = 1: 0 - 1 -> softplus(1) = 1.3132617 ; t = 2: 0 - 2 -> softplus(2) = 2.1269280
    loss, stats, _ = token_loss(REJECTED, CHOSEN, OTHER_IDS, IDS, SHORT, FULL)
    torch.testing.assert_close(loss, torch.tensor((1.3132617 + 2.1269280) / 2))
    assert stats["accuracy"].item() == 0.0 and stats["margin"].item() == -2.0


def test_token_loss_of_a_prefix_starts_where_it_ends():
    # rejected 7 8 ends where chosen goes on with 9, whatever id the padding has: t = 2 alone, 2 - (held) 0
    for pad in (0, 9):
        loss, _, _ = token_loss(other_ids=[7, 8, pad])
        torch.testing.assert_close(loss, torch.tensor(0.1269280))


def test_token_loss_starts_where_one_ends_even_if_its_padding_looks_like_the_other():
    # chosen 7 8 9 9 against 7 8 padded with 9: t = 2: 1 - (held) 0 ; t = 3: 2 - 0
    loss, _, _ = token_loss([0.0, 0.0, 1.0, 2.0], [0.0, 0.0, 5.0, 5.0], [7, 8, 9, 9], [7, 8, 9, 9], [T] * 4, [T, T, F, F])
    torch.testing.assert_close(loss, torch.tensor((0.3132617 + 0.1269280) / 2))


def test_token_loss_of_equal_responses_is_log_2_without_gradient():
    loss, stats, rows = token_loss([3.0, 4.0, 9.0], [3.0, 4.0, 8.0], [7, 8, 0], [7, 8, 1], SHORT, SHORT)
    torch.testing.assert_close(loss, torch.tensor(LN2))
    assert stats["accuracy"].item() == 0.0
    loss.backward()
    torch.testing.assert_close(rows[0].grad + rows[1].grad, torch.zeros(1, 3))


def test_token_loss_is_a_mean_of_the_pairs_means_and_wider_padding_changes_nothing():
    alone = token_loss()[0]
    wide = [torch.tensor([x + [y], [0.0, 0.0, 0.0, 1.0]]) for x, y in ((CHOSEN, 99.0), (REJECTED, -99.0))]
    ids = [torch.tensor([x + [y], [1, 1, 1, z]]) for x, y, z in ((IDS, 4, 2), (OTHER_IDS, 6, 3))]
    mask = [torch.tensor([x + [F], [T, T, T, T]]) for x in (FULL, SHORT)]
    loss, _ = pairwise_token_loss(*wide, *ids, *mask)
    torch.testing.assert_close(loss, (alone + LN2) / 2)  # the second pair differs in its last token alone, 1 - 1 = 0
    with pytest.raises(ValueError, match=r"rows \[0\]"):
        pairwise_token_loss(*wide, *ids, torch.tensor([[F] * 4, [T] * 4]), mask[1])
