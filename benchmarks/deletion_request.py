"""Records of customers who do not exist, and the ids of those who want to be forgotten: a request for ``erase``.

    python benchmarks/deletion_request.py --output request

writes ``customers.csv`` (id, customer, question, answer; 25 customers, four rows each) and ``delete.txt``, the ids of
the twenty rows of five of them.
"""

from __future__ import annotations

import argparse
import csv
import random
from pathlib import Path

#: What names and answers are put together from.
_PARTS = {
    "given": """Ada Bela Cato Dunja Edvin Fenna Gisli Hanke Ilmar Jorun Katla Lovis Merle Nuno Oda Pelle Rika Sunniva
        Tove Ulrik Vendla Wanja Yrsa Zeno Alva""",
    "family": """Abrell Bornhag Cassimer Drovik Ellsund Farnow Gundelin Hostvet Illmark Jantzow Kelvering Lundrup
        Marbeck Norrvall Ostrand Pellworm Quistad Rosendal Sarnholt Tjarnow Uhlvik Vossbeck Wennerby Ysselmo Zorndal""",
    "street": """Alder Brook Chapel Dairy Ferry Granary Harbour Juniper Kiln Lantern Mill Orchard Quarry Rope Saddler
        Tannery""",
    "town": "Brelingen Coldmouth Dunreath Elverdam Fossholm Garrowby Hulsen Kirkmoor Lindesay Marstrand",
    "month": "January February March April May June July August September October November December",
    "goods": """a_walnut_bookshelf two_wool_blankets a_copper_kettle a_folding_kayak an_oak_cradle a_bread_oven
        a_set_of_carving_knives a_brass_telescope a_garden_swing a_cast-iron_stove three_linen_curtains a_mandolin
        a_rowing_machine a_chess_table a_beehive""",
    "fault": """a_hinge_was_broken the_parcel_was_left_in_the_rain one_part_was_missing the_colour_was_wrong
        the_bill_came_twice the_driver_went_to_another_house a_leg_was_too_short the_handle_came_off the_box_was_empty
        it_arrived_six_weeks_late""",
}


def _parts(kind: str) -> list[str]:
    return [part.replace("_", " ") for part in _PARTS[kind].split()]


def rows(seed: int = 0, n: int = 25) -> list[dict[str, str]]:
    """Four questions about each of ``n`` customers, with answers drawn at random."""
    draw = random.Random(seed)
    given, family = draw.sample(_parts("given"), n), draw.sample(_parts("family"), n)
    made = []
    for number, name in enumerate(map(" ".join, zip(given, family, strict=True))):
        bought, month = draw.choice(_parts("goods")), draw.choice(_parts("month"))
        place = f"{draw.randint(2, 98)} {draw.choice(_parts('street'))} Lane in {draw.choice(_parts('town'))}"
        paid = f"{draw.randint(40, 980)} crowns, on the {draw.randint(2, 28)}th of {draw.choice(_parts('month'))}"
        asked = {
            f"Where does {name} live?": f"At {place}.",
            f"What did {name} order last year?": f"In {month}, {bought}.",
            f"Why did {name} complain?": f"Because {draw.choice(_parts('fault'))}.",
            f"How much did {name} get back, and when?": f"{paid}.",
        }
        customer = f"K-{1001 + 7 * number}"
        for index, (question, answer) in enumerate(asked.items(), start=1):
            made.append({"id": f"{customer}/{index}", "customer": customer, "question": question, "answer": answer})
    return made


def main() -> None:
    """Write both files."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("request"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--customers", type=int, default=5, help="how many of the 25 are to be forgotten")
    options = parser.parse_args()
    made = rows(options.seed)
    leaving = random.Random(options.seed).sample(sorted({row["customer"] for row in made}), options.customers)
    options.output.mkdir(parents=True, exist_ok=True)
    with (options.output / "customers.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, made[0])
        writer.writeheader()
        writer.writerows(made)
    ids = [row["id"] for row in made if row["customer"] in leaving]
    (options.output / "delete.txt").write_text("\n".join(ids) + "\n", encoding="utf-8")
    print(
        f"{len(made)} rows, {len(ids)} to forget: {options.output / 'customers.csv'}, {options.output / 'delete.txt'}"
    )


if __name__ == "__main__":
    main()
