"""Programs that install, build and measure; `gcompress install` runs some of them from the package."""
