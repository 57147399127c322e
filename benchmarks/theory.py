"""All experiments of docs/theory.md, one after another. ``make theory``; options and settings: theory_common.py."""

from __future__ import annotations

import theory_coreset
import theory_first_order
import theory_gradients
import theory_loss_choice
import theory_task_data
import theory_toy
from theory_common import NO_GSM8K, options, run


def main() -> None:
    chosen = options(__doc__)
    for figure in (theory_toy, theory_gradients, theory_first_order, theory_loss_choice, theory_coreset):
        print(f"\n{(figure.__doc__ or '').splitlines()[0]}", flush=True)
        figure.main()
    if chosen.gsm8k is None:
        print(f"\nThe share of GSM8K in the calibration text is left out: {NO_GSM8K}")
    else:
        theory_task_data.main()


if __name__ == "__main__":
    run(main)
