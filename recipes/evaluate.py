"""
The robustness of any image classifier: a local folder or a Hub id, dense or packed, ours or not.

    python recipes/evaluate.py --model outputs/vit-digits-demo --dataset digits --epsilon 0.1
    accelerate launch recipes/evaluate.py --model you/your-model --attacks clean pgd-20 autoattack --n 1000

Every option is in `--help`. An evaluation that was cut off goes on when it is started again.
"""

from tscnc_hf.cli.evaluate import evaluate_model, parse


def main(args: list[str] | None = None) -> None:
    evaluate_model(parse(args))


if __name__ == "__main__":
    main()
