"""Train, tune and compress language models without gradients."""

__version__ = "0.1.0"

# Public name -> module: resolved on first use, so that `import gfopt` stays light.
_WHERE = {
    "gfopt.space": "Real Integer Categorical Space Box",
    "gfopt.optimizer": "Optimizer Generational METHODS make_optimizer",
    "gfopt.study": "Study Result minimize",
    "gfopt.search.random": "RandomSearch SobolSearch",
    "gfopt.search.genetic": "GeneticAlgorithm selection_probability arithmetic_crossover gaussian_mutation",
    "gfopt.search.swarm": "ParticleSwarm CompetitiveSwarm",
    "gfopt.search.differential": "DifferentialEvolution LSHADE",
    "gfopt.search.strategies": "EvolutionStrategy SNES XNES",
    "gfopt.search.covariance": "cma_runs",
    "gfopt.search.cma": "CMAES SepCMAES",
    "gfopt.search.large": "CRFMNES",
    "gfopt.search.pareto": "NSGA2 hypervolume",
    "gfopt.bayes.posterior": "bayes_posterior",
    "gfopt.bayes.gp": "GaussianProcess",
    "gfopt.bayes.bayesopt": "BayesianOptimization",
    "gfopt.bayes.trust_region": "TuRBO",
    "gfopt.bayes.tpe": "TPE",
    "gfopt.bayes.multifidelity": "Fidelity SuccessiveHalving Hyperband ASHA",
    "gfopt.lm.zeroth_order": "ZerothOrder",
    "gfopt.lm.evolution": "LowRankES",
    "gfopt.lm.subspace": "subspace",
    "gfopt.lm.prompts": "soft_prompt prompt_space",
    "gfopt.lm.probe": "probe",
    "gfopt.lm.finetune": "finetune",
    "gfopt.lm.replay": "replay",
    "gfopt.lm.tune": "tune",
    "gfopt.compress.front": "compress",
    "gfopt.compress.export": "load_compressed",
}
_HOME = {name: module for module, names in _WHERE.items() for name in names.split()}
__all__ = [*_HOME]


def __getattr__(name):
    if name not in _HOME:
        raise AttributeError(f"module 'gfopt' has no attribute {name!r}")
    from importlib import import_module

    value = globals()[name] = getattr(import_module(_HOME[name]), name)
    return value


def __dir__():
    return sorted([*globals(), *_HOME])
