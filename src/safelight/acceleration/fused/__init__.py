"""Operations between matrix products, each as one kernel: `fuse` takes them where they are exact."""
