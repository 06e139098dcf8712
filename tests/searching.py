"""What the tests of search share: a space with everything in it, and the loop."""

from gfopt.space import Categorical, Integer, Real, Space

MIXED = Space(
    lr=Real(1e-4, 1.0, log=True),
    depth=Integer(1, 8),
    act=Categorical(["relu", "gelu", "silu"]),
    beta=Real(0.5, 0.99, when={"act": ["gelu"]}),
)


def run(opt, f, evaluations):
    "Ask and tell until so many points were evaluated."
    used = 0
    while used < evaluations:
        z = opt.ask()
        opt.tell(z, f(z))
        used += len(z)
    return opt


def best_after(opt, f, evaluations):
    "The best loss of so many points."
    return run(opt, f, evaluations).best[1]
