"""All experiments of docs/theory.md, one after another. ``make theory``; options and settings: theory_common.py.

What each took is written to RESULTS/theory.json, from what its parts took when they were computed.
"""

from __future__ import annotations

import theory_coreset
import theory_first_order
import theory_gradients
import theory_loss_choice
import theory_task_data
import theory_toy
from theory_common import NO_GSM8K, Parts, options, run, write_result


def main() -> None:
    chosen = options(__doc__)
    for figure in (theory_toy, theory_gradients, theory_first_order, theory_loss_choice, theory_coreset):
        print(f"\n{(figure.__doc__ or '').splitlines()[0]}", flush=True)
        figure.main()
    if chosen.gsm8k is None:
        print(f"\nThe share of GSM8K in the calibration text is left out: {NO_GSM8K}")
    else:
        theory_task_data.main()
    rows = [
        {"figure": figure, "parts": len(taken), "seconds": sum(taken.values())} for figure, taken in Parts.taken.items()
    ]
    total = sum(row["seconds"] for row in rows)
    result = {"question": "how long the parts of every figure took", "rows": rows, "minutes": total / 60}
    write_result(chosen.results / "theory.json", "theory", result)
    print(f"\nAll parts together took {total / 60:.0f} minutes: {chosen.results / 'theory.json'}")


if __name__ == "__main__":
    run(main)
