"""Operations between matrix products, each as one kernel: `fuse` takes them where they are exact."""

from safelight.acceleration.fused.fusion import FusionCheck, FusionReport, fuse, unfuse, use_operators

__all__ = ["FusionCheck", "FusionReport", "fuse", "unfuse", "use_operators"]
