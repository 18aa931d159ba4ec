"""Results for people: tables out of bundles and profiles. Nothing here measures or changes anything."""
