"""Random numbers from a seed and a counter, which a weighting keeps in buffers."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
_FIRST = 0x21F0AAAD
_SECOND = 0xD35A2D97 - 2**32  # the same modulo 2**32, and no product leaves int64, whose overflow is undefined
_STRIDE = 0x9E3779B9 - 2**32  # 2**32 over the golden ratio, so that indices are far apart before they are mixed


def uniform(seed: Tensor, counter: Tensor, count: int) -> Tensor:
    r"""Returns numbers in :math:`[0, 1)` that are a function of the arguments alone.

    torch's generators keep their state outside of ``state_dict`` and differ from rank to rank. Here the seed and the
    counter are the whole state: equal ones give equal numbers on every rank, after a restart, compiled or not. Number
    :math:`i` is the upper 24 bits of

    .. math::
        m(m(m(s + g) + c) + i g)

    with :math:`s` the seed, :math:`c` the counter, :math:`g` an odd constant, sums and products modulo :math:`2^{32}`,
    and :math:`m` a mixing function of 32-bit words, after which each bit depends on every bit. It maps 0 to 0, hence
    the first :math:`g`: a seed of 0 would start with a number of 0.

    Args:
        seed: 0-dim, int64, in :math:`[0, 2^{32})`. Not checked: the lower 32 bits count.
        counter: 0-dim, int64. The numbers repeat after :math:`2^{32}` counts.
        count: how many numbers.

    Shape:
        Returns ``[count]``, float32, on the device of ``seed``.

    Examples:
        >>> import torch
        >>> from torch_pathloss.weighting._generator import uniform
        >>> seed, counter = torch.tensor(7), torch.tensor(0)
        >>> uniform(seed, counter, 2).equal(uniform(seed, counter, 3)[:2])
        True
        >>> uniform(seed, counter, 2).equal(uniform(seed, counter + 1, 2))
        False

    References:
        The constants of the mixing function are those of least bias that C. Wellons, `Prospecting for Hash Functions
        <https://nullprogram.com/blog/2018/07/31/>`_, found for two multiplications.
    """
    index = torch.arange(count, device=seed.device) * _STRIDE
    words = _mix(_mix(_mix(seed + _STRIDE & _WORD) + counter & _WORD) + index & _WORD)
    return (words >> 8).to(torch.float32) * 2.0**-24  # exact


def normal(seed: Tensor, counter: Tensor, count: int) -> Tensor:
    """Returns standard normal numbers that are a function of the arguments alone, by the method of Box and Muller.

    Args:
        seed: see `uniform`.
        counter: see `uniform`.
        count: how many numbers.

    Shape:
        Returns ``[count]``, float32, on the device of ``seed``. None is farther from 0 than 5.77.

    Examples:
        >>> import torch
        >>> from torch_pathloss.weighting._generator import normal
        >>> normal(torch.tensor(7), torch.tensor(0), 3).shape
        torch.Size([3])
    """
    radius, angle = uniform(seed, counter, 2 * count).view(2, count)
    length = torch.log1p(-radius).mul(-2).sqrt()  # log(1 - u) is finite for u in [0, 1)
    return length * torch.cos(2 * math.pi * angle)


def _mix(word: Tensor) -> Tensor:
    word = (word ^ word >> 16) * _FIRST & _WORD
    word = (word ^ word >> 15) * _SECOND & _WORD
    return word ^ word >> 15
