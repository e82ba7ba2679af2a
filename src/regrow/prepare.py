"""What a recipe asks for, in the words of the stages, and everything about it that can be refused before hours of work.

What this gives up: faults that only the model's numbers show.
"""

from __future__ import annotations

import warnings
from pathlib import Path

from regrow.artifacts.ask import SPREADS
from regrow.artifacts.budget import Budget
from regrow.artifacts.goal import LIKENESSES
from regrow.artifacts.pattern import Pattern
from regrow.artifacts.shape import Anatomy
from regrow.artifacts.share import ZERO_SPREADS
from regrow.artifacts.sparsity import Sparsity
from regrow.cut_checks import check_asked_shape, check_chosen_by, chosen_criteria
from regrow.engines import checkpoint, masks, moving_masks, provenance, spp_forward, tokens, zeros
from regrow.engines.adapters import adaptable
from regrow.engines.bind import Subject
from regrow.engines.distil import check_teacher
from regrow.engines.domains import joined
from regrow.engines.kept_teacher import check_k
from regrow.engines.match import check_depths
from regrow.engines.packed import Packed
from regrow.engines.refit import check_halves, check_refit
from regrow.engines.texts import Part, documents, is_rows, shared
from regrow.errors import RegrowWarning, SettingsError, TextError
from regrow.foretold import foretold_plan
from regrow.kept import calibration
from regrow.learn_checks import check_learn
from regrow.level_checks import check_levels
from regrow.plan_checks import warn_of_smaller
from regrow.recovery import BASE, HELDOUT_TOKENS, KEEPS, KEEPS_CUT, Recover
from regrow.recovery_checks import check_recovery
from regrow.settings import Recipe
from regrow.stages import sparsify
from regrow.stages.evaluate import check_asked, check_length, read_text
from regrow.stages.plan import Wish, check_wish, meet
from regrow.stages.score import reads_text


def check_words(recipe: Recipe) -> Wish | None:
    """Refuse names, patterns and budgets that cannot be, reading no file. Raises `InputError`; returns as `check`."""
    if recipe.cuts and recipe.sparsify is not None:
        raise SettingsError(
            f"keep = {recipe.keep} and sparsify in one run",
            "one of them; a cut of uniform widths can be made sparse afterwards",
            "cut first, then `regrow sparsify` the folder",
        )
    check_asked_shape(recipe)
    wish, recipe = as_wish(recipe), as_trained(recipe)
    SPREADS.get(recipe.spread)
    if recipe.sparsify is not None:
        Pattern.parse(recipe.sparsify.pattern)
        ZERO_SPREADS.get(recipe.sparsify.spread)
        sparsify.choose(recipe.sparsify)
    check_recovery(recipe)
    check_levels(recipe)
    check_learn(recipe)
    return wish


def fitted(recipe: Recipe, anatomy: Anatomy) -> Recipe:
    """With groups for heads, where a search names heads and every head has keys and values of its own."""
    if recipe.search is None or anatomy.sizes["G"] > 1 or "head" not in recipe.axes:
        return recipe
    axes = dict.fromkeys("group" if unit == "head" else unit for unit in recipe.axes)
    return recipe.model_copy(update={"axes": tuple(axes)})


def check(recipe: Recipe) -> Wish | None:
    """Refuse what can be refused before a model is read. Raises `InputError`; returns what is asked of the planner."""
    wish = check_words(recipe)
    recipe = as_trained(recipe)
    if not recipe.cuts and recipe.sparsify is None and not (recipe.recover and recipe.recover.tokens):
        raise SettingsError("a run that changes nothing", "keep, sparsify or recover", "say what is to be done")
    if calibrates(recipe):
        documents(recipe.calibration.text, "calibration")
    check_chosen_by(recipe)
    check_asked(recipe.evaluate)
    _check_apart(recipe)
    for asked in trainings(recipe).values():
        if asked.teacher not in (None, BASE):
            checkpoint.locate(str(asked.teacher))
        for source in asked.sources:
            tokens.check_lessons(documents(source, "recovery"), asked.template, asked.learn)
    return wish


def trainings(recipe: Recipe) -> dict[str, Recover]:
    """The trainings of a run, by their keys in its recipe."""
    found: dict[str, Recover | None] = {"learn": recipe.learn, "recover": recipe.recover}
    return {name: asked for name, asked in found.items() if asked is not None and asked.tokens}


def _check_apart(recipe: Recipe) -> None:
    """Raise `TextError` when the file to measure on holds documents that are calibrated or trained on."""
    file = recipe.evaluate.text
    if file is None or not Path(file).expanduser().is_file():
        return  # other sources give their held-out part
    used: list[tuple[str, Part]] = []
    if calibrates(recipe):
        used.append((recipe.calibration.text, "calibration"))
    for asked in trainings(recipe).values():
        used += [(source, "recovery") for source in asked.sources]
    rows = is_rows(Path(file))
    texts = [document.text for document in documents(file, None)] if rows else [read_text(file)[1]]
    for source, part in used:
        common = shared(texts, documents(source, part))
        if common:
            raise TextError(
                f"{file} is to be measured on, and {common} of its paragraphs are {part} text from {source}",
                "a text that is neither calibrated nor trained on",
                "measure on another file, on the held-out part of this one (heldout:FILE), or on another source: demo",
            )


def check_subject(subject: Subject, recipe: Recipe, wish: Wish | None) -> None:
    """Refuse what this model cannot have, and warn of what it will not do well, before anything long begins."""
    recipe = as_trained(recipe)
    if wish is not None:
        check_wish(subject.anatomy, wish)
        meet(subject.anatomy, wish, wish.budget.target(subject.anatomy))
    if recipe.sparsify is not None:
        sparsify.check(subject, recipe.sparsify)
        if said := sparsify.warning(subject.anatomy, recipe.sparsify, recipe.calibration.tokens):
            warnings.warn(said, RegrowWarning, stacklevel=2)
    if wish is None:
        check_spp(subject, recipe)
    else:
        check_steps(subject, recipe, wish)
    check_zeros(subject, recipe)
    check_tongue(subject, recipe)
    check_blocks(subject, recipe)
    check_texts(subject, recipe)


def check_steps(subject: Subject, recipe: Recipe, wish: Wish) -> None:
    """Refuse steps that lead nowhere whatever the scores, merging where fewer heads stay than go, refitting what cannot
    be, and merging and refitting in a sparse model. Raises `SettingsError`, `BudgetError`."""
    if recipe.search is None and (recipe.stages > 1 or recipe.refit is not None or wish.merge != "off"):
        plan, guessed = foretold_plan(subject.model.config, subject.anatomy, wish, recipe.stages)
        if recipe.refit is not None and not guessed:
            check_refit(subject.anatomy, plan)
    if recipe.refit is not None and wish.merge != "off":
        raise SettingsError(
            f"refit and merge_heads = {wish.merge}", "one of them: what is merged is read otherwise", "leave one out"
        )
    mends = recipe.refit is not None or wish.merge != "off"
    sparse = mends and zeros.of_model(subject.model, subject.anatomy, None).sparse
    if recipe.refit is not None and sparse:
        raise SettingsError(
            "refit of a sparse model, whose zeros it would fill", "a dense model", "cut first, sparsify then"
        )
    if wish.merge != "off" and sparse:
        raise SettingsError(
            f"merge_heads = {wish.merge} of a sparse model, whose zeros it would fill",
            "a dense model",
            "merge heads first and sparsify then, or leave merge_heads out",
        )


def ranking(recipe: Recipe) -> Recover:
    """How a search's candidates are trained: as the recipe recovers, else all weights, from the model itself."""
    return recipe.recover or Recover(method="full", teacher=recipe.model, learning_rate=1e-4, batch=4)


def as_trained(recipe: Recipe) -> Recipe:
    """With a recovery of all that is trained: where nothing is trained but a search's candidates, of their tokens."""
    ranks = 0 if recipe.search is None else recipe.search.rank_tokens
    if not ranks or (recipe.recover is not None and recipe.recover.tokens):
        return recipe
    return recipe.model_copy(update={"recover": ranking(recipe).model_copy(update={"tokens": ranks})})


def settled(recipe: Recipe) -> Recipe:
    """With the teacher `base` named: the model that all steps before began with. Raises `ModelError`."""
    asked = recipe.recover
    if asked is None or asked.teacher != BASE:
        return recipe
    return recipe.model_copy(update={"recover": asked.model_copy(update={"teacher": provenance.root(recipe.model)})})


def with_method(recipe: Recipe, zeros: Sparsity | None) -> Recipe:
    """Where no way to recover is named, a model with `zeros`, or that gets them, has them kept."""
    asked = recipe.recover
    sparse = (zeros is not None and zeros.sparse) or recipe.sparsify is not None
    if asked is None or not sparse or "method" in asked.model_fields_set:
        return recipe
    keeps = KEEPS_CUT if recipe.cuts else KEEPS
    named = Recover.model_validate({**asked.model_dump(exclude_unset=True), "method": keeps})
    return recipe.model_copy(update={"recover": named})


def check_spp(subject: Subject, recipe: Recipe) -> None:
    """Refuse a rank of SPP that does not divide the outputs of every linear, and what experts cannot have. Raises
    `SettingsError`."""
    asked = recipe.recover
    if asked is None or not asked.tokens or asked.method != "spp":
        return
    from regrow.engines.spp import check_dropout, outputs

    modules = [(name, subject.model.get_submodule(name)) for name in adaptable(subject.model, "spp")]
    for name, module in modules:
        check_dropout(module, name, asked.dropout or 0.0)
    rows = {part: count for name, module in modules for part, count in outputs(module, name).items()}
    spp_forward.check_rank(asked.rank, rows)


def check_tongue(subject: Subject, recipe: Recipe) -> None:
    """Refuse a teacher whose tokens are others, whose files are broken, or who is the model itself, before anything is
    pruned for it. Raises `SettingsError`, `BrokenModel`."""
    asked = recipe.recover
    if asked is None or not asked.tokens or asked.teacher is None:
        return
    folder = checkpoint.locate(asked.teacher)
    trust = recipe.trust_remote_code
    config = checkpoint.read_config(folder, trust_remote_code=trust)
    checkpoint.check_files(folder)
    tokenizer = checkpoint.read_tokenizer(folder, config, trust_remote_code=trust)
    check_teacher(subject.model.config, config, subject.tokenizer, tokenizer)
    if asked.distil.cache is not None:
        check_k(asked.distil.cache, subject.model.config.vocab_size, config.vocab_size)
    check_depths(
        LIKENESSES.get(asked.distil.likeness),
        asked.distil.states,
        subject.anatomy.sizes["L"],
        getattr(config, "num_hidden_layers", subject.anatomy.sizes["L"]),
    )
    changes = recipe.cuts or recipe.sparsify is not None
    if not changes and provenance.fingerprint(folder) == subject.source["fingerprint"]:
        raise SettingsError(
            f"teacher {asked.teacher}, which is the model itself: there is nothing to learn from it",
            "the model it was made from, or another with the same tokenizer",
            "name the teacher; `base` is known only of folders that regrow wrote",
        )
    if not recipe.cuts:
        warn_of_smaller(asked.teacher, subject.model.num_parameters())


def check_zeros(subject: Subject, recipe: Recipe) -> None:
    """Refuse to move the zeros of a model that has none and gets none. Raises `SettingsError`."""
    asked = recipe.recover
    if asked is not None and asked.tokens and asked.method == "ast" and recipe.sparsify is None:
        moving_masks.needed(masks.masks_of(subject.model, subject.anatomy))


def check_blocks(subject: Subject, recipe: Recipe) -> None:
    """Refuse blocks longer than what the model was made for. Raises `SettingsError`."""
    most = getattr(subject.model.config, "max_position_embeddings", None)
    asked = {"calibration.block": recipe.calibration.block} if calibrates(recipe) else {}
    asked |= {f"{name}.block": training.block for name, training in trainings(recipe).items()}
    for name, block in asked.items():
        if most is not None and block > most:
            raise SettingsError(
                f"{name} = {block}, and the model reads {most} tokens at most",
                f"up to {most}",
                "ask for shorter blocks",
            )


def check_texts(subject: Subject, recipe: Recipe) -> None:
    """Refuse text that does not fill one block, or teaches nothing, before anything long begins. Raises `TextError`."""
    check_length(subject.model, subject.tokenizer, recipe.evaluate)
    if recipe.sparsify is not None and sparsify.reads_text(recipe.sparsify):
        text, block = documents(recipe.calibration.text, "calibration"), recipe.calibration.block
        what = f"the calibration part of {recipe.calibration.text}"
        tokens.blocks(text, subject.tokenizer, block=block, tokens=block, seed=recipe.seed, what=what)
    if recipe.refit is not None:
        check_halves(calibration(subject, recipe, min(recipe.refit.tokens, 2 * recipe.calibration.block)))
    for asked in trainings(recipe).values():
        for part, _, seed in training_parts(asked, recipe.seed):
            recovery_text(subject, asked, part, count=asked.block, seed=seed)


def training_parts(asked: Recover, seed: int) -> tuple[tuple[Part, int, int], ...]:
    """What is trained on and what its curve is measured on: the part of its text, tokens, seed."""
    return ("recovery", asked.tokens, seed), ("heldout", HELDOUT_TOKENS, 0)


def recovery_text(subject: Subject, asked: Recover, part: Part, *, count: int, seed: int) -> Packed:
    """`count` tokens of a part of each text that a recovery asks for, with what of them is learnt."""
    found = [
        tokens.lessons(
            documents(source, part),
            subject.tokenizer,
            block=asked.block,
            tokens=count,
            seed=seed,
            template=asked.template,
            learn=asked.learn,
            what=f"the {part} part of {source}",
        )
        for source in asked.sources
    ]
    return joined(found) if asked.mixture else found[0]


def calibrates(recipe: Recipe) -> bool:
    """Whether any stage reads the calibration text; a search judges by it, whatever the scores read."""
    always = recipe.refit is not None or recipe.search is not None
    scored = recipe.learn is None or recipe.learn.scored
    cutting = recipe.cuts and scored and (always or reads_text(chosen_criteria(recipe)))
    return cutting or (recipe.sparsify is not None and sparsify.reads_text(recipe.sparsify))


def as_wish(recipe: Recipe) -> Wish | None:
    """What a recipe asks of the planner; None when no unit is to go."""
    if not recipe.cuts:
        return None
    return Wish(
        budget=Budget.parse(recipe.keep or "100%"),
        axes=recipe.axes,
        widths=recipe.shape or None,
        split=recipe.split,
        spread=recipe.spread,
        uniform=recipe.uniform,
        divisors=recipe.divisors,
        rescale_norms=recipe.rescale_norms,
        protect=recipe.protect,
        merge=recipe.merge_heads,
    )
