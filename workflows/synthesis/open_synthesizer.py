"""Opens a `Synthesizer` from settings: the teacher's engine, and the model or service that asks the questions."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from cartridges.config import BuildSettings
from cartridges.errors import UserError
from cartridges.models import BaseModel
from cartridges.records import Chunk
from cartridges.selfstudy.asker import Ask, Asker, EngineAsker
from cartridges.selfstudy.synthesizer import Synthesizer


@contextmanager
def open_synthesizer(settings: BuildSettings, chunks: Mapping[str, Chunk], base: BaseModel | None = None
                     ) -> Iterator[Synthesizer]:
    """A `Synthesizer` of `chunks` by id, in this process. `base`: the model, where it is loaded already."""
    from cartridges.engines.transformers import TransformersEngine
    from cartridges.models import load_base_model

    if not runs_on_vllm(settings):
        base = base or load_base_model(settings.model)
        yield Synthesizer(TransformersEngine(base), base.template, chunks, settings.synthesize, make_asker(settings))
        return
    from cartridges.engines.vllm import VllmEngine
    from cartridges.engines.vllm_setup import for_model
    from cartridges.models import resolve_model_dir

    wanted = for_model(settings.vllm, settings.model)
    wanted = wanted.model_copy(update={"max_topk": max(wanted.max_topk, settings.synthesize.topk)})
    engine = VllmEngine(resolve_model_dir(settings.model), wanted)
    try:
        yield Synthesizer(engine, engine.translator.template, chunks, settings.synthesize, make_asker(settings))
    finally:
        engine.close()


def runs_on_vllm(settings: BuildSettings) -> bool:
    """On this machine. Raises `UserError` where the settings ask for vLLM and it is not installed."""
    from torch.cuda import is_available

    from cartridges.engines.vllm_setup import wants_vllm

    wanted = settings.synthesize.engine
    return wants_vllm(wanted, "synthesize.engine") and (wanted == "vllm" or is_available())


def make_asker(settings: BuildSettings) -> Asker | None:
    """None where the teacher asks itself."""
    from cartridges.engines.transformers import TransformersEngine
    from cartridges.models import load_base_model

    wanted = settings.synthesize.asking
    if wanted.endpoint:
        from cartridges.selfstudy.endpoint_asker import EndpointAsker

        return EndpointAsker(settings.synthesize)
    if wanted.model:
        base = load_base_model(wanted.model)
        return EngineAsker(TransformersEngine(base), base.template, settings.synthesize)
    return None


def check_generation(settings: BuildSettings) -> None:
    """Raises `UserError` for an engine that is not installed, lengths that the model has not, an asking model or an
    asking service that cannot be used. Where conversations are there already nobody is asked, so it is for those who
    make some."""
    from cartridges.models import load_identity, resolve_model_dir

    on_vllm, wanted = runs_on_vllm(settings), settings.synthesize
    identity = load_identity(resolve_model_dir(settings.model))
    if wanted.topk > identity.vocab_size:
        raise UserError(f"synthesize.topk={wanted.topk} is more than the {identity.vocab_size} tokens that the model "
                        "knows")
    window = identity.max_position_embeddings
    if on_vllm and settings.vllm.max_model_len:
        window = min(window, settings.vllm.max_model_len)
    longest = wanted.chunk.max_tokens + wanted.max_question_tokens + wanted.max_answer_tokens
    if longest > window:
        raise UserError(f"a chunk, a question and an answer (synthesize.chunk.max_tokens, max_question_tokens and "
                        f"max_answer_tokens: {longest} together) do not fit the window of {window} tokens; lower them")
    if settings.synthesize.asking.model:
        load_identity(resolve_model_dir(settings.synthesize.asking.model))
    if settings.synthesize.asking.endpoint:
        from cartridges.selfstudy.endpoint_asker import EndpointAsker

        EndpointAsker(settings.synthesize, retries=1).check(_samples(settings))


def _samples(settings: BuildSettings) -> list[Ask]:
    """One request of each kind that the families make."""
    from cartridges.selfstudy.families import DEFAULT_MIXTURE

    told = Ask(0, seed_prompt="Ask a question about bread.", text="Bread is baked.")
    continued = Ask(0, completion="Text: Bread is baked.\nAnswer: baked\nQuestion:")
    families = settings.synthesize.families or DEFAULT_MIXTURE
    return [told, continued] if families.get("anchored_asked") else [told]
