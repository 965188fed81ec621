//! The registry of sink types. A new sink is a folder under `host/sinks/` and one line here.

use shardmill_config::SinkTypes;

/// Sink types, in the order in which messages list them.
pub const SINK_TYPES: SinkTypes = SinkTypes::new(&[
    shardmill_sink_stdout::TYPE,
    shardmill_sink_sqlite::TYPE,
    shardmill_sink_postgres::TYPE,
    shardmill_sink_objects::TYPE,
    shardmill_sink_redshift::TYPE,
    shardmill_kinesis::sink::TYPE,
    shardmill_sink_http::TYPE,
    shardmill_sinks_common::discard::TYPE,
]);

#[cfg(test)]
mod tests {
    use std::path::Path;

    use shardmill_config::{
        ConfigError, KeyDefault, PipelineConfig, SinkType, one_spelling, parse,
    };

    use super::*;

    /// Parses a pipeline with this sink.
    fn pipeline(sink: &str) -> Result<PipelineConfig, ConfigError> {
        let text = format!(
            "[pipeline]\nname = \"p\"\nstate_dir = \"s\"\n[source]\ntype = \"file\"\npath = \"-\"\n\
             [[stage]]\nname = \"r\"\nplugin = \"p.wasm\"\nroutes = {{ a = [\"a\"] }}\n\
             [[sink]]\nname = \"a\"\n{sink}"
        );
        parse(Path::new("/w/p.toml"), text, &SINK_TYPES, &|_| None)
    }

    fn sound(sink: &str) -> PipelineConfig {
        pipeline(sink).unwrap_or_else(|error| panic!("{sink}\n{}", error.render(false)))
    }

    fn destination(sink: &str) -> Option<String> {
        sound(sink).sinks[0].destination()
    }

    /// Returns a sink of this type with only the required keys.
    fn least(own: &dyn SinkType) -> String {
        let mut sink = format!("type = {:?}\n", own.name());
        for key in own.keys() {
            if let KeyDefault::Required(example) = key.default {
                sink.push_str(&format!("{} = {example}\n", key.name));
            }
        }
        sink
    }

    /// Returns the keys that the message about an unknown key lists.
    fn taken(sink: &str) -> Vec<String> {
        let error = pipeline(&format!("{sink}\nqqqq = 1\n")).expect_err("an unknown key");
        let problem = error.problems().iter().find(|one| one.message() == "unknown key `qqqq`");
        let help = problem.and_then(|problem| problem.help()).expect("an unknown key");
        help.split('`').skip(1).step_by(2).map(str::to_owned).collect()
    }

    #[test]
    fn each_type_names_the_keys_that_it_takes() {
        for own in SINK_TYPES.iter() {
            let named = own.keys().iter().map(|key| key.name);
            let named: Vec<&str> =
                ["name", "type"].into_iter().chain(named).chain(["commit"]).collect();
            assert_eq!(named, taken(&least(own)), "the keys of {}", own.name());
        }
        // The reference begins with the keys that sinks of every type have.
        let page = SINK_TYPES.reference();
        let every = page.split("\n## ").nth(1).expect("a chapter");
        let rows = every.lines().filter_map(|line| line.strip_prefix("| `")?.split_once('`'));
        let shown: Vec<&str> = rows.map(|(key, _)| key).collect();
        let commit =
            taken(&format!("{}[sink.commit]", least(shardmill_sinks_common::discard::TYPE)));
        assert_eq!(shown[..3], ["name", "renamed_from", "commit"]);
        assert_eq!(shown[3..], commit);
    }

    #[test]
    fn what_a_type_calls_a_default_is_its_default() {
        let mut defaults = 0;
        for own in SINK_TYPES.iter() {
            let least = least(own);
            let plain = sound(&least);
            for key in own.keys() {
                if let KeyDefault::Value(value) = key.default {
                    let full = sound(&format!("{least}{} = {value}\n", key.name));
                    let (full, plain) = (&full.sinks[0].settings, &plain.sinks[0].settings);
                    assert!(**full == **plain, "{}: {full:?} and {plain:?}", key.name);
                    defaults += 1;
                }
            }
        }
        assert!(defaults > 10, "{defaults} defaults");
    }

    #[test]
    fn settings_are_equal_as_their_values_are() {
        let settings = |sink: &str| sound(sink).sinks.remove(0).settings;
        let sqlite = |table: &str| {
            settings(&format!("type = \"sqlite\"\npath = \"/a.db\"\ntable = {table:?}"))
        };
        assert!(*sqlite("t") == *sqlite("t"));
        assert!(*sqlite("t") != *sqlite("u"));
        assert!(*sqlite("t") != *settings("type = \"discard\""));
    }

    #[test]
    fn types_have_names_of_their_own() {
        let mut names: Vec<&str> = SINK_TYPES.iter().map(SinkType::name).collect();
        names.sort_unstable();
        assert!(names.windows(2).all(|pair| pair[0] != pair[1]), "{names:?}");
    }

    #[test]
    fn fault_25_one_destination_is_one_text_without_secrets() {
        let same = [
            [
                "type = \"postgres\"\nurl = \"postgres://a:hunter2@db:5432/d\"\ntable = \"t\"",
                "type = \"postgres\"\nurl = \"host=DB user=b dbname=d\"\ntable = \"public.t\"",
            ],
            [
                "type = \"sqlite\"\npath = \"/nowhere/m.db\"\ntable = \"T\"",
                "type = \"sqlite\"\npath = \"/nowhere/m.db\"\ntable = \"t\"",
            ],
            [
                "type = \"objects\"\nurl = \"s3://b/p/\"",
                "type = \"objects\"\nurl = \"s3://b/p\"\nformat = \"raw\"",
            ],
            [
                "type = \"http\"\nurl = \"https://h/hook/hunter2\"",
                "type = \"http\"\nurl = \"https://h:443/hook/hunter2\"",
            ],
        ];
        let same = same.into_iter().chain([
            [
                "type = \"postgres\"\nurl = \"postgres://a@127.0.0.1/d\"\ntable = \"t\"",
                "type = \"postgres\"\nurl = \"postgres://a@localhost/d\"\ntable = '\"t\"'",
            ],
            [
                "type = \"postgres\"\nurl = \"postgres://a@db/d?options=-c%20search_path%3Dx,public\"\ntable = \"t\"",
                "type = \"postgres\"\nurl = \"postgres://a@db/d\"\ntable = \"x.t\"",
            ],
            [
                "type = \"postgres\"\nurl = \"postgres://a@db/d?options=-csearch_path=x\"\ntable = \"y.t\"",
                "type = \"postgres\"\nurl = \"postgres://a@db/d\"\ntable = \"y.t\"",
            ],
            [
                "type = \"postgres\"\nurl = \"postgres://a@db/d\"\ntable = \"public.t\"",
                "type = \"postgres\"\nurl = \"postgres://a@db/d\"\ntable = '\"public\".\"t\"'",
            ],
            [
                "type = \"redshift\"\nurl = \"postgres://a@db/d\"\ntable = \"s.t\"\nstaging = \"s3://b/p\"\niam_role = \"arn:aws:iam::1:role/r\"",
                "type = \"redshift\"\nurl = \"postgres://a@db/d\"\ntable = 's.\"t\"'\nstaging = \"s3://b/p\"\niam_role = \"arn:aws:iam::1:role/r\"",
            ],
        ]);
        for [one, two] in same {
            let text = destination(one).expect("a destination");
            assert_eq!(Some(&text), destination(two).as_ref());
            assert!(!text.contains("hunter2"), "{text}");
        }
        for sink in [
            "type = \"kinesis\"\nstream = \"s\"\nendpoint = \"http://a:hunter2@h:1\"",
            "type = \"objects\"\nurl = \"s3://b/p\"\noptions = { endpoint = \"http://a:hunter2@h:1\" }",
        ] {
            let text = destination(sink).expect("a destination");
            assert!(text.ends_with("at http://h:1") && !text.contains("hunter2"), "{text}");
        }
        for sink in [
            "type = \"kinesis\"\nstream = \"s\"\nendpoint = \"http://h:1/hunter2\"",
            "type = \"kinesis\"\nstream = \"s\"\nendpoint = \"http://h:1/?key=hunter2\"",
            "type = \"objects\"\nurl = \"s3://b/p\"\noptions = { endpoint = \"http://h:1/hunter2\" }",
        ] {
            let text = destination(sink).expect("a destination");
            assert!(text.contains("at http://h:1 path ") && !text.contains("hunter2"), "{text}");
            assert_eq!(one_spelling(&text), text);
        }
        let other = [
            [
                "type = \"postgres\"\nurl = \"postgres://a@db/d\"\ntable = \"t\"",
                "type = \"postgres\"\nurl = \"postgres://a@db/e\"\ntable = \"t\"",
            ],
            [
                "type = \"postgres\"\nurl = \"postgres://a@db/d\"\ntable = \"t\"",
                "type = \"postgres\"\nurl = \"postgres://a@db:6432/d\"\ntable = \"t\"",
            ],
            [
                "type = \"postgres\"\nurl = \"postgres://a@db/d\"\ntable = \"a.t\"",
                "type = \"postgres\"\nurl = \"postgres://a@db/d\"\ntable = '\"a.t\"'",
            ],
            [
                "type = \"http\"\nurl = \"https://h/one\"",
                "type = \"http\"\nurl = \"https://h/two\"",
            ],
        ];
        for [one, two] in other {
            assert_ne!(destination(one), destination(two));
        }
        assert_eq!(destination("type = \"stdout\""), None);
    }
}
