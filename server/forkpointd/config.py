"""The settings of the server: one typed object from a file, the environment and flags.

Precedence: flags, then `FORKPOINT_*` environment variables, then the TOML file named by `--config`
(or `FORKPOINT_CONFIG`), then the defaults below. An unknown key or a wrong value is refused with
its name, so that a typing error never silently means a default.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, field_validator
from pydantic_settings import (
    BaseSettings,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from forkpointd.model import MIB


def default_listen() -> str:
    """`unix:` and the socket where the client looks when it is told nothing."""
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    if runtime:
        return f"unix:{runtime}/forkpoint/forkpoint.sock"
    if os.geteuid() == 0:
        return "unix:/run/forkpoint/forkpoint.sock"
    return f"unix:/tmp/forkpoint-{os.geteuid()}/forkpoint.sock"


def default_data_dir() -> Path:
    """Where sandboxes and snapshots live when nothing else is said."""
    if os.geteuid() == 0:
        return Path("/var/lib/forkpoint")
    home = os.environ.get("XDG_DATA_HOME") or str(Path.home() / ".local" / "share")
    return Path(home) / "forkpoint"


def _absolute(path: Path) -> Path:
    return Path(os.path.abspath(path.expanduser()))


AbsolutePath = Annotated[Path, AfterValidator(_absolute)]


OTHER_VARIABLES = (
    "FORKPOINT_CONFIG",
    "FORKPOINT_ADDRESS",
    "FORKPOINT_SIMULATOR_",
    "FORKPOINT_TEST_",
)
"""Variables of this project that are no settings of the server."""


class UnknownVariableError(ValueError):
    """A variable of the environment that looks like a setting and is none."""


class Settings(BaseSettings):
    """Every setting of forkpointd."""

    model_config = SettingsConfigDict(
        env_prefix="FORKPOINT_", extra="forbid", frozen=True, validate_default=True
    )

    data_dir: AbsolutePath = Field(default_factory=default_data_dir)
    """Registry, sandbox folders, snapshots."""
    listen: str = Field(default_factory=default_listen)
    """`unix:PATH`."""
    image_roots: Annotated[tuple[AbsolutePath, ...], NoDecode] = ()
    """Folders in which kernels, initrds and drives may lie; in the environment separated by `:`."""

    vmm: Literal["auto", "firecracker", "simulator"] = "auto"
    """`auto` is Firecracker where /dev/kvm can be used, else the simulator."""
    firecracker: AbsolutePath | None = None
    """The Firecracker to run (FORKPOINT_FIRECRACKER); None: found on PATH or in the cache."""
    strict_host: bool = False
    """Also refuse snapshots of another kernel or Firecracker release."""

    staging_dir: AbsolutePath = Path("/dev/shm")
    """A tmpfs in which windows are staged when they fit."""
    staging_bytes: int | None = Field(default=None, ge=0)
    """Budget of staging on tmpfs; None: what the tmpfs and MemAvailable allow."""
    memory_images_dir: AbsolutePath | None = None
    """A tmpfs for images that are kept in memory (durability MEMORY); None: `staging_dir`."""
    memory_images_bytes: int | None = Field(default=None, ge=0)
    """Budget of images in memory; None: what the tmpfs, MemAvailable and the memory budget allow;
    0: none are kept there."""
    write_back_delay_seconds: float = Field(default=0.0, ge=0)
    """An image in memory is written to the disk when it is as old as that: what is deleted before
    never costs a disk anything."""
    preallocate_bytes: int | None = Field(default=None, ge=0)
    """Memory for pages that are had before windows, where they are likely to write; None: an eighth
    of the memory; 0: none are."""
    concurrent_copies: int = Field(default=2, ge=1, le=64)
    """Pre-copies and merges at once in the whole server."""
    precopy_bytes_per_second: int | None = Field(default=None, ge=1024 * 1024)
    """The most that all pre-copies and merges together move in a second; None: no limit."""
    images_quota_bytes: int = Field(default=0, ge=0)
    """The most that snapshots, and what they are made of, take up on the disk; 0: all of it."""
    images_low_water_bytes: int = Field(default=0, ge=0)
    """So much of the disk stays free: work that would leave less is refused before it starts."""
    prune_keep_last: int | None = Field(default=None, ge=0)
    """Snapshots beyond the newest so many of each source are deleted; None: no such rule."""
    prune_older_than_seconds: float | None = Field(default=None, gt=0)
    """Snapshots that are older are deleted, but for those that `prune_keep_last` keeps; None: no
    such rule. Without either nothing is deleted."""
    auto_layered_bytes: int = Field(default=1024 * MIB, ge=0)
    """Where reflink is missing, layout AUTO is LAYERED for a base that holds so much on the disk;
    0: AUTO is FLAT."""
    flatten_depth: int = Field(default=32, ge=0)
    """So many layers over a flat image, and the newest is flattened in the background; 0: a chain
    may be as long as it grows."""
    flatten_chain_bytes: int = Field(default=0, ge=0)
    """The same for what the layers of a chain hold together; 0: that is no reason."""
    flatten_age_seconds: float = Field(default=0.0, ge=0)
    """The newest layer of a chain that did not grow for so long is flattened; 0: that is no
    reason."""
    max_queued_branches: int = Field(default=16, ge=0, le=1000)
    """Branches that may wait on one source."""
    max_fork_count: int = Field(default=1000, ge=1, le=10_000)
    """Children of one fork."""
    concurrent_starts: int = Field(default=32, ge=1, le=256)
    """Children that are started at once: a start waits more than it computes."""

    memory_budget_bytes: int | None = Field(default=None, ge=0)
    """What sandboxes and staging may have of the memory, as it is counted; None: what the host and
    the control group have, less a sixteenth and at least 512 MiB."""
    child_headroom_mib: int = Field(default=16, ge=0)
    """What a sandbox is counted with beyond what its guest has touched."""

    window_deadline_seconds: float = Field(default=30.0, gt=0)
    """After this a branch whose window has no reply is FAILED and its source UNKNOWN; a window that
    is predicted to be longer has ten times its prediction."""
    auto_full_max_pause_seconds: float = Field(default=1.0, ge=0)
    """AUTO takes FULL for an invalid base up to this predicted window."""
    vmm_call_timeout_seconds: float = Field(default=10.0, gt=0)
    """For single requests to Firecracker (pause, resume, describe)."""
    drain_seconds: float = Field(default=20.0, ge=0)
    """How long a drain waits for branches and calls at work before the server leaves."""
    retention_days: float = Field(default=7.0, gt=0)
    """How long ended branches and forks stay visible."""

    console_bytes: int = Field(default=4 * MIB, ge=64 * 1024)
    """How much of each console's output is kept."""
    loop_lag_report_seconds: float = Field(default=0.0, ge=0)
    """How often the event loop's worst lag is logged; 0: never."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"

    @field_validator("image_roots", mode="before")
    @classmethod
    def _split_roots(cls, value: Any) -> Any:
        if isinstance(value, str):
            return tuple(part for part in value.split(":") if part)
        return value

    @field_validator("listen")
    @classmethod
    def _known_listen(cls, value: str) -> str:
        if not value.startswith("unix:") or len(value) == len("unix:"):
            raise ValueError(
                "must be unix:PATH; TCP needs TLS, which this version doesn't have yet"
            )
        return value

    @classmethod
    def load(cls, config_file: Path | None, **flags: Any) -> Settings:
        """The settings from file, environment and flags (those that are not None).

        Raises `pydantic.ValidationError` naming each wrong setting, `UnknownVariableError`,
        `OSError` or `tomllib.TOMLDecodeError` for the file.
        """
        if config_file is not None and not config_file.is_file():
            raise FileNotFoundError(f"there is no settings file {config_file}")
        unknown = sorted(
            name
            for name in os.environ
            if name.startswith("FORKPOINT_")
            and name.removeprefix("FORKPOINT_").lower() not in cls.model_fields
            and not name.startswith(OTHER_VARIABLES)
        )
        if unknown:
            raise UnknownVariableError(
                f"{', '.join(unknown)}: no setting of forkpointd is called so; unset it"
            )

        class Loaded(cls):  # type: ignore[valid-type, misc]
            @classmethod
            def settings_customise_sources(
                cls,
                settings_cls: type[BaseSettings],
                init_settings: PydanticBaseSettingsSource,
                env_settings: PydanticBaseSettingsSource,
                dotenv_settings: PydanticBaseSettingsSource,
                file_secret_settings: PydanticBaseSettingsSource,
            ) -> tuple[PydanticBaseSettingsSource, ...]:
                sources: tuple[PydanticBaseSettingsSource, ...] = (init_settings, env_settings)
                if config_file is not None:
                    sources += (TomlConfigSettingsSource(settings_cls, toml_file=config_file),)
                return sources

        given = {key: value for key, value in flags.items() if value is not None}
        loaded: Settings = Loaded(**given)
        return loaded
