"""Known answers: what the best policy of an environment reaches, and how far any other is from it.

An environment is exactly solvable when its reference is an n-gram model and its reward a finite automaton (10^6 states
are no problem), or when the prefixes that its reference can produce are few enough to enumerate. The tasks that come
registered (``rlhf_gym/WoAiNi-v0`` and its like, `rlhf_gym.exact.tasks`) are; `ngram_from_table` and `Automaton` make more.
"""

from .automaton import Automaton
from .evaluate import Evaluation, evaluate
from .languages import combine, keywords, length_window, matches, repetitions, word_scores
from .ngram import NgramConfig, NgramForCausalLM, ngram_from_corpus, ngram_from_table
from .policies import POLICY_KINDS, TabularConfig, TabularForCausalLM, make_policy, tabular_policy
from .residual import ResidualConfig, ResidualForCausalLM, residual_policy
from .samples import BestOfN, Certificate, PluginObjective, best_of_n, certificate, plugin_objective
from .solve import Frontier, Solution, frontier, solve

__all__ = [
    "POLICY_KINDS",
    "Automaton",
    "BestOfN",
    "Certificate",
    "Evaluation",
    "Frontier",
    "NgramConfig",
    "NgramForCausalLM",
    "PluginObjective",
    "ResidualConfig",
    "ResidualForCausalLM",
    "Solution",
    "TabularConfig",
    "TabularForCausalLM",
    "best_of_n",
    "certificate",
    "combine",
    "evaluate",
    "frontier",
    "keywords",
    "length_window",
    "make_policy",
    "matches",
    "ngram_from_corpus",
    "ngram_from_table",
    "plugin_objective",
    "repetitions",
    "residual_policy",
    "solve",
    "tabular_policy",
    "word_scores",
]
