"""Our own architecture for transformers, in files that are copied beside the weights of an exported model."""

from pathlib import Path

FILES = ("configuration_polyclinic.py", "mixture_polyclinic.py", "attention_polyclinic.py", "modeling_polyclinic.py")
AUTO_MAP = {
    "AutoConfig": "configuration_polyclinic.PolyclinicConfig",
    "AutoModel": "modeling_polyclinic.PolyclinicModel",
    "AutoModelForCausalLM": "modeling_polyclinic.PolyclinicForCausalLM",
}  # what transformers runs of them where it is told to trust a folder's code


def register() -> None:
    """From now on transformers' Auto classes know model folders of ours, and need not trust code that lies in them."""
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM  # takes seconds to import

    from moe.hf.architecture.configuration_polyclinic import PolyclinicConfig
    from moe.hf.architecture.modeling_polyclinic import PolyclinicForCausalLM, PolyclinicModel

    AutoConfig.register(PolyclinicConfig.model_type, PolyclinicConfig, exist_ok=True)
    AutoModel.register(PolyclinicConfig, PolyclinicModel, exist_ok=True)
    AutoModelForCausalLM.register(PolyclinicConfig, PolyclinicForCausalLM, exist_ok=True)


def files() -> list[Path]:
    return [Path(__file__).with_name(name) for name in FILES]
