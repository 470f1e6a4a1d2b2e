//! Inputs of `record`: the example of docs/state-format.md, and disks of a few images.

use super::super::record::{ABSENT, FILE, MISSING, TEXT, slot};
use super::Seed;

const PAGE: &str = include_str!("../../../docs/state-format.md");

/// All of them.
pub fn all() -> Vec<Seed> {
    let example = PAGE
        .split("```\n")
        .find(|block| block.contains("\"members\""));
    let example = example.expect("the page has an example");
    let (_, text) = example.split_once('\n').expect("a line and a text");
    // The example names a map, which an input does not have.
    let without_map = text.replace("\"count\": 2", "\"count\": 0");

    let mut nowhere = text.to_owned();
    while let Some(runs) = nowhere.find("{\n        \"runs\"") {
        let end = nowhere[runs..].find("}\n      }").expect("its end") + "}\n      }".len();
        nowhere.replace_range(runs..runs + end, "\"nowhere\"");
    }
    let of_text = |text: &str| counted(TEXT, text.as_bytes());
    let of_other = nowhere.replace(
        "\"replica\": \"8d0c7a51-3c0f-4d0e-9a45-30ee5b3dd9a1\"",
        "\"replica\": \"f2f0e7b4-59a5-4a1b-8b57-2b8ef22a9c65\"",
    );
    assert!(nowhere != text && of_other != nowhere);
    let everywhere = nowhere.replace("nowhere", "everywhere");
    let with_jobs = |jobs: &[&str]| {
        let list = format!(",\n  \"jobs\": [{}]\n}}", jobs.join(", "));
        nowhere
            .trim_end()
            .strip_suffix("\n}")
            .expect("its end")
            .to_owned()
            + &list
    };
    let job = r#"{ "id": "job7", "type": "quorum-scrub", "node-name": null, "cancelled": false,
        "error": "no quorum for 1 sector", "ended": 1785312000, "done-bytes": 512,
        "total-bytes": 512, "corrupt-sectors": 1, "unreadable-sectors": 0, "sectors-written": 1 }"#;
    // Four members, of which the image is one; one branch; no table before; killed; t = 2; an
    // epoch.
    let numbers = |replica: u8, epoch: u8| {
        let head = [255 - 128 - 64 - 32, 3, replica, 0, 0, 1, 0, 1, 1, epoch];
        [&head[..], &[0, 0, 0, 0, 0]].concat()
    };
    let disk = |options: u8, images: &[Vec<u8>]| [&[options][..], &images.concat()].concat();
    vec![
        (
            "the example",
            disk(0, &[of_text(&nowhere), of_text(&of_other)]),
        ),
        ("a map that is not there", disk(0, &[of_text(&without_map)])),
        ("stale everywhere", disk(0, &[of_text(&everywhere)])),
        (
            "a file",
            disk(0, &[counted(FILE, &slot(nowhere.as_bytes())[..2000])]),
        ),
        ("a job", disk(0, &[of_text(&with_jobs(&[job]))])),
        ("too many jobs", disk(0, &[of_text(&with_jobs(&[job; 9]))])),
        ("a new disk", disk(0, &[vec![ABSENT], vec![ABSENT]])),
        (
            "four images",
            disk(
                0,
                &[numbers(0, 1), numbers(1, 1), numbers(2, 1), numbers(3, 1)],
            ),
        ),
        (
            "an older image, and a missing one",
            disk(
                0,
                &[numbers(0, 2), numbers(1, 2), numbers(2, 1), vec![MISSING]],
            ),
        ),
        ("forced", disk(0b11_0001, &[numbers(0, 1)])),
        (
            "one is the truth",
            disk(0b110, &[numbers(0, 1), numbers(1, 3)]),
        ),
    ]
}

fn counted(kind: u8, bytes: &[u8]) -> Vec<u8> {
    let count = u16::try_from(bytes.len()).expect("a short input");
    [&[kind][..], &count.to_le_bytes(), bytes].concat()
}
