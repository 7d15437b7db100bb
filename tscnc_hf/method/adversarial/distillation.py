"""Following a teacher: the divergence of a network's predictions from those of a dense robust one."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


ADVERSARIAL_SHARE = 5 / 6  # of the term; the rest is of the clean images (RSLAD's setting for CIFAR)


def distillation_term(
    clean: Tensor, adversarial: Tensor, teacher: Tensor, temperature: float = 1.0, weights: Tensor | None = None
) -> Tensor:
    """
    RSLAD's outer loss (Zi, Zhao, Ma and Jiang 2021, arXiv 2108.07969, equation 7), at a temperature: the mean over
    images of

        T^2 [ 1/6 KL(p_T(x) || q_T(x)) + 5/6 KL(p_T(x) || q_T(x_adv)) ],   p_T = softmax(logits / T) of the teacher,

    q of the network that learns. The teacher sees clean images only, as in ARD (Goldblum, Fowl, Feizi and Goldstein
    2020, arXiv 1905.09747), whose term is the second one; T^2 keeps gradients of one size over temperatures (Hinton,
    Vinyals and Dean 2015). Labels and the attack are the objective's: RSLAD uses no labels, and attacks this
    divergence.

    Args:
        clean, adversarial, teacher (`Tensor`): logits (b, k), of clean and adversarial images, and the teacher's of
            the clean ones, to which no gradient flows.
        temperature (`float`): T > 0.
        weights (`Tensor`, *optional*): (b,), by which each image's part is multiplied before the mean.
    """
    target = F.log_softmax(teacher.detach() / temperature, dim=-1)

    def divergence(logits: Tensor) -> Tensor:
        student = F.log_softmax(logits / temperature, dim=-1)
        return F.kl_div(student, target, reduction="none", log_target=True).sum(-1)

    found = (1 - ADVERSARIAL_SHARE) * divergence(clean) + ADVERSARIAL_SHARE * divergence(adversarial)
    return temperature**2 * (found if weights is None else weights * found).mean()
