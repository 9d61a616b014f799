"""Bundles on the hub: what may be published, and the upload."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from msgspec.structs import replace

from cascade_rt import CascadePipeline, Request
from cascade_rt.bundle import Bundle
from cascade_rt.errors import BundleError, EngineError, ExportError, RequestError, plain, refused, shortened
from cascade_rt.manifest import MANIFEST, Manifest

from .card import Drawn, card_of
from .job import Report
from .official import OFFICIAL_LICENCE, OFFICIAL_REPOS, UNKNOWN_LICENCE

PROMPTS = {
    "tiny": (
        "a large red circle at the left on a blue background",
        "a yellow star above a green square on a black background",
        "a small purple heart at the top on a white background",
    )
}
"""What a card's pictures show, by size; the words that the tiny cascade knows are few."""
OTHER_PROMPTS = ("a photograph of a lighthouse on a rocky coast at sunset",)
HUB_SECONDS = 10


@dataclass(frozen=True, kw_only=True)
class Publication:
    """What becomes of a bundle that is published.

    Attributes:
        repo: ``OWNER/NAME``, made where it is not there.
        private: only its owner sees it.
        licence: of the weights, where the bundle does not say.
        pictures: draw the model card's pictures with the bundle.
        quiet: no progress bar.

    Raises:
        RequestError: no repository has such a name.
    """

    repo: str
    private: bool = False
    licence: str | None = None
    pictures: bool = True
    quiet: bool = False

    def __post_init__(self) -> None:
        try:
            from huggingface_hub.utils import HFValidationError, validate_repo_id
        except ImportError as error:
            raise RequestError(
                "publishing needs huggingface_hub; install it with: pip install huggingface_hub"
            ) from error
        try:
            validate_repo_id(self.repo)
            if self.repo.count("/") != 1:
                raise HFValidationError
        except HFValidationError:
            raise refused("--push-to-hub", self.repo, "OWNER/NAME of letters, digits, -, _ and .") from None

    def check_licence(self, licence: str | None, source: str) -> None:
        """Refuse weights that may not be made public.

        Args:
            licence: that the checkpoint or the bundle names; None and `UNKNOWN_LICENCE`: it names none.
            source: what the weights came from.

        Raises:
            RequestError: they may not.
        """
        if self.private:
            return
        if OFFICIAL_LICENCE in (licence or "") or source in OFFICIAL_REPOS:
            raise RequestError(
                f"weights of {plain(source)} are under the {OFFICIAL_LICENCE}, so that cascade-export does not make "
                "copies of them public; add --private",
                field="--push-to-hub",
                value=self.repo,
                accepted="a private repository",
            )
        if self.licence is None and (licence or UNKNOWN_LICENCE) == UNKNOWN_LICENCE:
            raise RequestError(
                f"{plain(source)} does not say under which licence its weights are, so that nobody could tell what a "
                "public copy may be used for; name it with --licence, for example --licence apache-2.0, or add "
                "--private",
                field="--licence",
                value=None,
                accepted="the licence of the weights",
            )

    def push(self, bundle: Bundle, report: Report) -> str:
        """Upload a bundle, its model card and the card's pictures, in one commit.

        Args:
            bundle: of which every file that the manifest names is uploaded.
            report: gets a line for what was done.

        Returns:
            The address of the repository.

        Raises:
            RequestError: the weights may not be made public.
            BundleError: a file is missing or damaged.
            ExportError: the hub did not take it.
        """
        from huggingface_hub import CommitOperationAdd, HfApi
        from huggingface_hub.utils import disable_progress_bars

        if self.quiet or sys.stderr is None or not sys.stderr.isatty():
            disable_progress_bars()
        for model in bundle.manifest.models.values():
            self.check_licence(model.licence or bundle.manifest.model.licence, model.source)
        manifest = licensed(bundle.manifest, self.licence)
        drawn = list(self._pictures(bundle, report))
        files: dict[str, str | bytes] = {name: str(bundle.file(name)) for name in manifest.files}
        files |= {picture.file: picture.png for picture in drawn}
        files |= {MANIFEST: manifest.to_json().encode(), "README.md": card_of(manifest, self.repo, drawn).encode()}
        hub = HfApi()
        try:
            address = hub.create_repo(self.repo, private=self.private, exist_ok=True)
            if self.private and not hub.model_info(self.repo, timeout=HUB_SECONDS).private:
                raise RequestError(
                    f"{self.repo} is public already, and nothing was uploaded; make it private in its settings, or "
                    "name another one"
                )
            added = [CommitOperationAdd(name, content) for name, content in files.items()]
            hub.create_commit(self.repo, added, commit_message=f"{manifest.model.name}: a bundle of cascade-rt")
        except RequestError:
            raise
        except Exception as error:  # the hub client raises many unrelated types; all mean "not taken"
            said = shortened(" ".join(plain(str(error)).split()), 200)
            raise ExportError(
                f"the hub did not take {self.repo} ({type(error).__name__}: {said}); log in with: hf auth login"
            ) from error
        return str(address)

    def _pictures(self, bundle: Bundle, report: Report) -> Iterator[Drawn]:
        """Pictures that the bundle draws; none where it cannot draw any here, which is reported."""
        if not self.pictures:
            return
        for seed, prompt in enumerate(PROMPTS.get(bundle.manifest.model.size, OTHER_PROMPTS)):
            try:
                with CascadePipeline(bundle) as pipe:
                    pipe.set_progress_bar_config(disable=True)
                    image = pipe.run(Request(prompt=prompt, seeds=(seed,))).images[0]
            except (BundleError, EngineError) as error:
                report(f"the model card has no pictures: {error}")
                return
            data = io.BytesIO()
            image.save(data, "PNG")
            yield Drawn(file=f"pictures/{seed}.png", prompt=prompt, seed=seed, png=data.getvalue())


def licensed(manifest: Manifest, licence: str | None) -> Manifest:
    """The manifest with a licence where it names none."""
    if licence is None:
        return manifest
    models = {
        name: replace(row, licence=licence) if row.licence in ("", UNKNOWN_LICENCE) else row
        for name, row in manifest.models.items()
    }
    named = "; ".join(dict.fromkeys(row.licence for row in models.values()))
    return replace(manifest, models=models, model=replace(manifest.model, licence=named or licence))
