"""vLLM: visual tokens chosen by our reducers, prompts merged in a Llama, prompt lookup; found by vLLM itself.

`register` is the entry point (group ``vllm.general_plugins``) that vLLM calls in each of its processes. What is done is
said by ``hf_overrides={"architectures": [one of ARCHITECTURES], "quickmerge": {"visual": {"type": "SCOPE", ...}}}``.
Only modules of this folder import vllm, and only when vLLM loads a model by one of the names.
"""

from __future__ import annotations

from quickmerge.serve.vllm.plugin import ARCHITECTURES, LOOKUP, TESTED, check_version, register

__all__ = ["ARCHITECTURES", "LOOKUP", "TESTED", "check_version", "register"]
