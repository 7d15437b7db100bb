"""A model's classes beside those of a data set: what is silent, what is a warning, what is refused."""

import pytest

from tscnc_hf.data.class_names import compare_class_names


CIFAR = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
STL = ["airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck"]
DIGITS = [str(digit) for digit in range(10)]


@pytest.mark.parametrize("names", [CIFAR, [name.title() for name in CIFAR], [f"LABEL_{i}" for i in range(10)], DIGITS])
def test_nothing_is_said_of_the_same_names_or_of_none(names):
    assert compare_class_names(names, CIFAR) is None


def test_other_names_are_a_warning_that_shows_some_of_both():
    said = compare_class_names(CIFAR, STL)
    assert said.startswith("Warning: ") and "\n" not in said and "compared by number" in said
    assert "has automobile, frog;" in said and "has car, monkey;" in said and "2 of the 8 names" in said
    assert "airplane, automobile, bird, cat, ...; only" in compare_class_names(CIFAR, DIGITS)


def test_another_number_of_classes():
    with pytest.raises(ValueError, match=r"it has 10 \(airplane, .*\.\.\.\), the data set 3 \(rose, lily, fern\)"):
        compare_class_names(CIFAR, ["rose", "lily", "fern"])
    assert "of 10 classes" in compare_class_names(CIFAR, CIFAR[:5])  # a part of them
    assert "LABEL_0, LABEL_1" in compare_class_names(["LABEL_0", "LABEL_1"], ["rose", "lily", "fern"])


def test_the_same_names_in_another_order_or_case():
    with pytest.raises(ValueError, match="in another order"):
        compare_class_names(["Dog", "Cat"], ["cat", "dog"])
