"""One image store: a folder with a catalogue and the blobs it names."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wnodes_core.errors import DigestMismatch, FetchError, UnknownImage, WnodesError
from wnodes_core.images import catalogue, formats, purge, settle, use, writing
from wnodes_core.images.catalogue import Entry, Part
from wnodes_core.images.flight import Flight, Progress, quiet
from wnodes_core.images.hashing import digest_of
from wnodes_core.images.layout import Layout
from wnodes_core.images.naming import as_ref, naming
from wnodes_core.images.users import User
from wnodes_core.model import Boot, Image, ImageRef

if TYPE_CHECKING:
    from wnodes_core.settings import PurgeSettings

DEFAULT_FETCH_S = 1800.0


class Store:
    """The images of one folder. ``hook`` is pluggy's relay; without it nothing can be fetched.

    ``extra`` are folders of further catalogue files, which go before the store's own and are
    never written (a site's ``/etc/wnodes/images.d``).
    """

    def __init__(self, folder: str | Path, hook: Any = None, *, extra: Sequence[str | Path] = ()) -> None:
        self.layout = Layout(Path(folder))
        self.hook = hook
        self.extra = tuple(Path(path) for path in extra)
        self.flight = Flight(self.layout, hook)

    # The catalogue

    def entries(self) -> list[Entry]:
        """All images of the catalogue, fetched or not."""
        return self._read()[0]

    def problems(self) -> list[WnodesError]:
        """What is wrong with catalogue files; their images do not count until it is mended."""
        return list(self._read()[1])

    def _read(self) -> tuple[list[Entry], list[Any]]:
        return catalogue.read_folders((*self.extra, self.layout.catalogue))

    def list(self, user: User | None = None) -> Sequence[Entry]:
        """The images that a user (default: ourselves) may have, by name."""
        user = user or User.current()
        return sorted((e for e in self.entries() if e.allows(user)), key=str)

    def resolve(self, ref: str | ImageRef, user: User | None = None) -> Entry:
        """The image that a user means. Raises BadRequest, UnknownImage, AmbiguousImage, ImageDenied."""
        entries, problems = self._read()
        try:
            return catalogue.resolve(entries, as_ref(ref), user or User.current())
        except UnknownImage as error:
            if problems:
                error.hint = f"a catalogue file does not count: {problems[0].message}"
            raise

    # The blobs

    def image(self, entry: Entry) -> Image | None:
        """The image if all of it lies in this store, readable by us; None otherwise."""
        readable = (os.access(self.layout.blob(digest), os.R_OK) for digest in entry.digests)
        if not all(readable) or not all(self._has(digest) for digest in entry.digests):
            return None
        return self._as_image(entry, self.layout.blob(entry.disk.digest))

    def _has(self, digest: str) -> bool:
        path = self.layout.blob(digest)
        if not path.exists():
            return False
        if settle.sound(self.layout, digest):
            return True
        path.unlink(missing_ok=True)
        return False

    def _as_image(self, entry: Entry, disk: Path) -> Image:
        named = (("kernel", entry.kernel), ("initrd", entry.initrd))
        paths = {key: str(self.layout.blob(part.digest).absolute()) for key, part in named if part}
        return Image(
            name=entry.name,
            tag=entry.tag,
            digest=entry.disk.digest,
            path=str(disk.absolute()),
            format=entry.format,
            arch=entry.arch,
            boot=Boot(paths["kernel"], paths.get("initrd", ""), entry.cmdline) if "kernel" in paths else None,
            facts=dict(entry.facts),
        )

    def ensure(self, entry: Entry, progress: Progress = quiet, deadline: float | None = None) -> Image:
        """The image, fetched if need be and verified; at once when it is here already.

        ``deadline`` is a ``time.monotonic()`` value (default: half an hour from now).

        Raises FetchError, DigestMismatch, BadFormat, StateDirFull.
        """
        image = self.image(entry)
        if image is None:
            self.layout.make()
            until = time.monotonic() + DEFAULT_FETCH_S if deadline is None else deadline
            for part in entry.parts:
                if not self._has(part.digest):
                    check = self._checker(entry, part)
                    public = self._public(part.digest, entry)
                    with naming(entry):
                        self.flight.bring(part, check, public=public, progress=progress, deadline=until)
            image = self._as_image(entry, self.layout.blob(entry.disk.digest))
        self._guard(entry)
        return image

    def _checker(self, entry: Entry, part: Part) -> Callable[[Path], None]:
        def check(path: Path) -> None:
            if part is entry.disk:
                formats.check(path, entry.format)
                if self.hook is not None:
                    self.hook.wnodes_image_verify(image=self._as_image(entry, path))

        return check

    def _public(self, digest: str, entry: Entry) -> bool:
        return entry.public or any(e.public and digest in e.digests for e in self.entries())

    def _guard(self, entry: Entry) -> None:
        """Note the time of use, and set who may read, for catalogues change after a fetch."""
        for digest in entry.digests:
            path = self.layout.blob(digest)
            with suppress(PermissionError, FileNotFoundError):
                os.utime(path)
                mode = 0o444 if os.geteuid() != 0 or self._public(digest, entry) else 0o440
                if path.stat().st_mode & 0o004 != mode & 0o004:
                    os.chmod(path, mode)

    def verify(self, entry: Entry, progress: Progress = quiet) -> None:
        """Read all of an image again and ask the verifying plug-ins.

        A file that proves wrong is thrown away, so that the next use fetches it anew.

        Raises DigestMismatch, BadFormat, UnknownImage when it is not in this store.
        """
        for part in entry.parts:
            path = self.layout.blob(part.digest)
            if not path.exists():
                raise UnknownImage(f"image '{entry}': not in the store", hint=f"wnodes image pull {entry}")
            found = digest_of(path, progress)
            if found != part.digest:
                in_use = use.user_of(self.layout, part.digest)
                if not in_use:
                    path.unlink(missing_ok=True)
                kept = f"kept, for it is in use by {in_use}" if in_use else "removed; the next use fetches it anew"
                raise DigestMismatch(f"image '{entry}': {path} has become {found}", hint=kept)
            with naming(entry):
                self._checker(entry, part)(path)
            settle.settle(self.layout, part.digest)

    # Changes (catalogue first or last is decided in ``writing``)

    def add(self, source: str, ref: str | ImageRef, **facts: Any) -> Entry:
        """Bring an image in and enter it: see ``writing.add`` for the further arguments."""
        return writing.add(self, source, as_ref(ref), **facts)

    def tag(self, ref: str | ImageRef, new: str | ImageRef) -> Entry:
        """Give an image a further name or tag. Raises what ``resolve`` raises, SettingsError."""
        return writing.tag(self, self.resolve(ref), as_ref(new))

    def remove(self, ref: str | ImageRef) -> Sequence[purge.Purged]:
        """Take a name away, and what nothing else names or uses; what was removed."""
        return writing.remove(self, self.resolve(ref))

    # Use

    def used_by(self, entry: Entry) -> str:
        """Who uses an image right now, in words; '' if nobody does."""
        return next((who for digest in entry.digests if (who := use.user_of(self.layout, digest))), "")

    def mark_use(self, digest: str, lease: str, uid: int = 0) -> None:
        """Keep a blob from purging while a lease lives; idempotent."""
        use.mark(self.layout, digest, lease, uid)
        with suppress(FileNotFoundError):
            os.utime(self.layout.blob(digest))

    def unmark_use(self, digest: str, lease: str) -> None:
        """The lease is over; idempotent."""
        use.unmark(self.layout, digest, lease)

    def take(self, entry: Entry, lease: str, uid: int) -> None:
        """Mark all files of an image for a lease and let its user read them; idempotent.

        Raises FetchError when the image is not here (any more), SettingsError, StateDirFull.
        """
        for digest in entry.digests:
            self.mark_use(digest, lease, uid)
            if not self.layout.blob(digest).exists():
                self.release(lease)
                raise FetchError(f"image '{entry}': it is not in the store any more")
            if not self._public(digest, entry):
                use.grant(self.layout, digest, uid)

    def release(self, lease: str) -> None:
        """Undo ``take`` of a lease, whatever it took; idempotent."""
        for digest, leases in use.marks(self.layout).items():
            if lease in leases:
                use.unmark(self.layout, digest, lease)
                use.revoke(self.layout, digest, leases[lease])

    def release_dead(self, living: Collection[str]) -> Sequence[str]:
        """Undo ``take`` of every lease that is not in ``living``; which they were."""
        return use.drop_dead(self.layout, living)

    def grant(self, digest: str, uid: int) -> None:
        """Let a user read a restricted blob; idempotent. Raises SettingsError."""
        use.grant(self.layout, digest, uid)

    def revoke(self, digest: str, uid: int) -> None:
        """End that, unless another marked lease of the user needs it; idempotent. Raises SettingsError."""
        use.revoke(self.layout, digest, uid)

    def purge(self, settings: PurgeSettings, *, dry_run: bool = False) -> Sequence[purge.Purged]:
        """Make room: see ``purge``. With ``dry_run`` only say what would go."""
        return purge.purge(self.layout, self.entries(), settings, dry_run=dry_run)
