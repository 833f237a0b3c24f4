import math

import pytest
import torch

from lit_rlhf.functional import adapt_kl_coef, k1, k2, k3

LN2 = math.log(2)


def test_estimators_by_hand():
    p, q = torch.tensor([0.5]).log(), torch.tensor([0.25]).log()
    torch.testing.assert_close(k1(p, q), torch.tensor([LN2]))
    torch.testing.assert_close(k2(p, q), torch.tensor([LN2**2 / 2]))
    torch.testing.assert_close(k3(p, q), torch.tensor([0.5 - 1 + LN2]))  # q/p - 1 - log(q/p)
    torch.testing.assert_close(k1(q, p), torch.tensor([-LN2]))  # a single k1 may be negative
    torch.testing.assert_close(k3(q, p), torch.tensor([2 - 1 - LN2]))


@pytest.mark.parametrize("estimator", [k1, k3])
def test_k1_and_k3_average_to_the_kl_under_p(estimator):
    p, q = torch.tensor([0.5, 0.5]), torch.tensor([0.25, 0.75])
    # KL = .5 ln 2 + .5 ln(2/3) = .5 ln(4/3)
    torch.testing.assert_close((p * estimator(p.log(), q.log())).sum(), torch.tensor(0.5 * math.log(4 / 3)))


def test_k3_does_not_cancel_and_is_never_negative():
    p = torch.tensor([-3.0, -3.0, -3.0])
    q = p + torch.tensor([2.0**-14, 0.0, -(2.0**-14)])
    got = k3(p, q)
    torch.testing.assert_close(got, torch.tensor([2.0**-29, 0.0, 2.0**-29]), rtol=1e-2, atol=0)  # d^2 / 2
    assert (got >= 0).all()


def test_controller_by_hand():
    setting = {"target": 6.0, "horizon": 10000, "n": 500}  # n / horizon = .05
    assert adapt_kl_coef(0.1, 6.0, **setting) == 0.1
    assert adapt_kl_coef(0.1, 6.6, **setting) == pytest.approx(0.1005)  # 1 + .1 * .05
    assert adapt_kl_coef(0.1, 60.0, **setting) == pytest.approx(0.101)  # clipped: 1 + .2 * .05
    assert adapt_kl_coef(0.1, -1.0, **setting) == pytest.approx(0.099)  # clipped: 1 - .2 * .05


def test_controller_refuses_what_would_break_it():
    with pytest.raises(ValueError, match="KL is nan"):
        adapt_kl_coef(0.1, math.nan, target=6.0, horizon=100, n=1)
    for target, horizon, n in ((0.0, 100, 1), (6.0, 100, 500), (6.0, 0, 1), (6.0, 100, 0)):
        with pytest.raises(ValueError, match="target"):
            adapt_kl_coef(0.1, 6.0, target=target, horizon=horizon, n=n)
