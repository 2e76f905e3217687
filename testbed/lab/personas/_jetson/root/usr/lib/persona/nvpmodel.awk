# Reads an nvpmodel.conf; wanted=ID picks a mode.
#   show="modes"    "ID NAME" per power model
#   show="default"  the ID of PM_CONFIG DEFAULT
#   show="settings" "PARAM ARGUMENT PATH VALUE" per line of the wanted mode

/^[[:space:]]*#/ || /^[[:space:]]*$/ { next }

/^[[:space:]]*<[[:space:]]*PARAM / { part = "param"; param = attribute("NAME"); next }
/^[[:space:]]*<[[:space:]]*POWER_MODEL / {
	part = "model"
	id = attribute("ID")
	if (show == "modes") printf "%d %s\n", id, attribute("NAME")
	next
}
/^[[:space:]]*<[[:space:]]*PM_CONFIG / {
	part = ""
	if (show == "default") print_line(attribute("DEFAULT"))
	next
}
part == "param" { path[param " " $1] = $2; next }
part == "model" && show == "settings" && id == wanted && (($1 " " $2) in path) {
	print_line($1 " " $2 " " path[$1 " " $2] " " $3)
}

function attribute(name,    i, pair) {
	for (i = 1; i <= NF; i++) {
		split($i, pair, "=")
		if (pair[1] == name) return pair[2]
	}
	return ""
}

function print_line(text) {
	printf "%s\n", text
}
