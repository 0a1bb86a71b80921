"""lesa against the best training-free method at the same number of full steps."""

from __future__ import annotations

from typing import Any

from lesa.evaluation.compare import Comparison
from lesa.evaluation.standing import OTHER_TAP, OURS

LESA = (OURS, OTHER_TAP)
FEW = 8  # steps of the sampler up to which one full step more is no small thing


def judge(rows: list[dict[str, Any]], counts: tuple[int, ...], steps: int) -> list[dict[str, Any]]:
    """One verdict per count: the gain over peers on their `own` published lists, and over peers
    that are `given` the list that was searched for lesa.

    Published lists seldom have just this many full steps: where the sampler has more than a few
    steps, a peer may have one full step more.
    """
    return [
        {
            "full_steps": count,
            "lesa": _ours(rows, count)["method"],
            "lesa_mean": _ours(rows, count)["psnr_mean"],
            "own": _gain(rows, count, "own", slack=steps > FEW),
            "given": _gain(rows, count, "searched", slack=False),
        }
        for count in counts
    ]


def show(title: str, result: Comparison, verdicts: list[dict[str, Any]]) -> None:
    """All rows, and what `judge` says."""
    print(f"\n{title}: plain {result.plain_seconds:.2f} s a batch")
    for r in sorted(result.rows, key=lambda r: (-r["full_steps"], -r["psnr_mean"])):
        quality = f"{r['psnr_mean']:6.2f} {r['psnr_p10']:6.2f} {r['psnr_min']:6.2f}"
        speed = f"{r['ssim_mean']:.4f} {r['speedup']:5.2f}x"
        print(f"{r['method']:13} {r['full_steps']:3d} {quality} {speed}  {r['schedule']}")
    for verdict in verdicts:
        for origin in ("own", "given"):
            if (gain := verdict[origin]) is not None:
                print(
                    f"{verdict['full_steps']} full, lists {origin}: {gain['mean']:+.2f} dB mean "
                    f"over {gain['best_peer']}, {gain['p10']:+.2f} dB worst decile"
                )


def _ours(rows: list[dict[str, Any]], count: int) -> dict[str, Any]:
    """Of the taps that were tried the one with the best mean."""
    found = [r for r in rows if r["method"] in LESA and r["full_steps"] == count]
    return max(found, key=lambda r: r["psnr_mean"])


def _gain(
    rows: list[dict[str, Any]], count: int, origin: str, slack: bool
) -> dict[str, Any] | None:
    """In dB, over the best mean and over the best worst decile; None without a peer."""
    peers = [
        row
        for row in rows
        if row["method"] not in LESA
        and row["schedule"].startswith(origin)
        and count <= row["full_steps"] <= count + slack
    ]
    if not peers:
        return None
    ours = _ours(rows, count)
    best, tail = (max(peers, key=lambda r: r[key]) for key in ("psnr_mean", "psnr_p10"))
    return {
        "best_peer": f"{best['method']} @{best['full_steps']}",
        "mean": ours["psnr_mean"] - best["psnr_mean"],
        "p10": ours["psnr_p10"] - tail["psnr_p10"],
    }
