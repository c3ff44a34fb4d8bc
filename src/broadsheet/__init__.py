"""Broadsheet: the daily papers on efficient, instruction-following language models, each one running.

``broadsheet.method("gear")`` imports a paper's method on demand; nothing heavy is imported before that.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import find_spec
from typing import Any

__version__ = "0.1.0"


def method(slug: str) -> Any:
    """The class that implements a paper; raises ValueError when the paper is unknown or does not run yet."""
    from broadsheet.catalogue import paper

    entry = paper(slug)
    if not entry.method:
        raise ValueError(f"'{slug}' is on the page but does not run yet; 'broadsheet papers' shows which do")
    return resolve(entry.method)


def resolve(name: str) -> Any:
    """The object that ``module:attribute`` names."""
    module, _, attribute = name.partition(":")
    return getattr(import_module(module), attribute)


class _Registration:
    """Teaches transformers to load what Broadsheet compressed, once and if transformers is imported at all.

    transformers has no entry points for quantisers: they must be registered after its registry is there. Importing it for
    that would make every command line wait, so this waits for its import instead.
    """

    registry = "transformers.modeling_utils"  # the first module that is complete when its registry is

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != self.registry:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: Any) -> None:
            execute(module)
            _register()

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


#: what a config.json may name as ``quant_method`` -> its configuration and its quantiser
_QUANTISERS = {
    "broadsheet": ("methods.weights.quantiser:PackedConfig", "methods.weights.quantiser:PackedQuantizer"),
    "dfloat11": ("methods.weights.dfloat11.loading:DFloat11Config", "methods.weights.dfloat11.loading:DFloat11Quantizer"),
}


class _Named:
    """A class that is imported when it is used: what imports transformers may be a module that the class needs."""

    def __init__(self, name: str):
        self._name = f"{__name__}.{name}"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return resolve(self._name)(*args, **kwargs)

    def __getattr__(self, attribute: str) -> Any:
        return getattr(resolve(self._name), attribute)


def _register() -> None:
    auto: Any = import_module("transformers.quantizers.auto")
    for method, (configuration, quantiser) in _QUANTISERS.items():
        auto.AUTO_QUANTIZATION_CONFIG_MAPPING[method] = _Named(configuration)
        auto.AUTO_QUANTIZER_MAPPING[method] = _Named(quantiser)
    modeling: Any = import_module(_Registration.registry)
    original = modeling.get_hf_quantizer

    def get_hf_quantizer(config: Any, *args: Any, **kwargs: Any) -> Any:
        # Folders of the official DFloat11 package name no method, and transformers would fill their model with noise.
        if getattr(config, "dfloat11_config", None) and getattr(config, "quantization_config", None) is None:
            config.quantization_config = {"quant_method": "dfloat11"}
        return original(config, *args, **kwargs)

    modeling.get_hf_quantizer = get_hf_quantizer


if _Registration.registry in sys.modules:
    _register()
else:
    sys.meta_path.insert(0, _Registration())
